# fish completion for qedfuse
# Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.

function __qedfuse_command -d 'The command on the line, if there is one yet'
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if contains -- $word umount
            echo $word
            return 0
        else if not string match -q -- '-*' $word
            return 1
        end
    end
    return 1
end

function __qedfuse_is -a name -d 'Is that the command, and enough before the cursor?'
    test (__qedfuse_command; or echo) = "$name"
end

function __qedfuse_mount_options -d 'Words between commas, behind what is there of them'
    set -l typed (commandline -ct)
    set -l before (string match -r '^.*,' -- $typed)
    for word in allow_other allow_root backing=confined backing=any backing=none backing_dir= backing_format=raw backing_format=qed cache_size= commit= compact=auto compact=off compact=full compact_size= compact_time= detect_zeroes=off detect_zeroes=on detect_zeroes=unmap direct_io dirsync discard force_share freelist=on freelist=off gid= growable noatime nodev nodiratime nodiscard noexec nosuid overlay= poll= readahead= relatime ro rw snapshot sync truncate=refuse truncate=zero uid= umask=
        echo "$before$word"
    end
end

complete -c qedfuse -n '__fish_is_first_token' -a umount -d 'unmount, and wait until everything is durable'

complete -c qedfuse -n 'not __qedfuse_command' -s o -x -a '(__qedfuse_mount_options)' -d 'options of the mount, between commas; may be given again'
complete -c qedfuse -n 'not __qedfuse_command' -s f -l foreground -d 'stay in the foreground'
complete -c qedfuse -n 'not __qedfuse_command' -s d -l debug -d 'stay in the foreground and log each request'
complete -c qedfuse -n 'not __qedfuse_command' -s r -l read-only -d 'the same as -o ro'
complete -c qedfuse -n 'not __qedfuse_command' -s s -d 'ignored, as libfuse\'s (from mount(8): ignore unknown options)'
complete -c qedfuse -n 'not __qedfuse_command' -l pidfile -r -F -d 'write the process number to FILE once the disk can be used'
complete -c qedfuse -n 'not __qedfuse_command' -s h -l help -d 'show this help'
complete -c qedfuse -n 'not __qedfuse_command' -s V -l version -d 'show the version'
complete -c qedfuse -n 'not __qedfuse_command' -F

complete -c qedfuse -n '__qedfuse_is umount' -l timeout -x -d 'wait no longer than this'
complete -c qedfuse -n '__qedfuse_is umount' -s h -l help -d 'show help'
complete -c qedfuse -n '__qedfuse_is umount' -F
