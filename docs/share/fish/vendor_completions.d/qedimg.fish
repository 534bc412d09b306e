# fish completion for qedimg
# Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.

function __qedimg_command -d 'The command on the line, if there is one yet'
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if contains -- $word info check create map convert compare measure resize rebase commit compact freelist dump
            echo $word
            return 0
        else if not string match -q -- '-*' $word
            return 1
        end
    end
    return 1
end

function __qedimg_is -a name -d 'Is that the command, and enough before the cursor?'
    test (__qedimg_command; or echo) = "$name"
end

complete -c qedimg -f
complete -c qedimg -n 'not __qedimg_command' -s h -l help -d 'show help'
complete -c qedimg -n 'not __qedimg_command' -s V -l version -d 'show the version'
complete -c qedimg -n 'not __qedimg_command' -a info -d 'describe an image, and report what is wrong with it'
complete -c qedimg -n 'not __qedimg_command' -a check -d 'find damage and leaked space; repair both'
complete -c qedimg -n 'not __qedimg_command' -a create -d 'create an image, standalone or over a base'
complete -c qedimg -n 'not __qedimg_command' -a map -d 'list data, zeros and holes, and where they are stored'
complete -c qedimg -n 'not __qedimg_command' -a convert -d 'copy a disk into another format, or a chain into one image'
complete -c qedimg -n 'not __qedimg_command' -a compare -d 'compare the content of two disks'
complete -c qedimg -n 'not __qedimg_command' -a measure -d 'compute how much space a QED copy would need'
complete -c qedimg -n 'not __qedimg_command' -a resize -d 'change the size of the disk'
complete -c qedimg -n 'not __qedimg_command' -a rebase -d 'give an overlay another base, or none'
complete -c qedimg -n 'not __qedimg_command' -a commit -d 'write an overlay\'s data into its base'
complete -c qedimg -n 'not __qedimg_command' -a compact -d 'make the file as short as possible'
complete -c qedimg -n 'not __qedimg_command' -a freelist -d 'show, keep or drop the list of free space in an image'
complete -c qedimg -n 'not __qedimg_command' -a dump -d 'show the header or a table, entry by entry'

complete -c qedimg -n '__qedimg_is info' -s f -x -a 'qed raw' -d 'do not guess the format'
complete -c qedimg -n '__qedimg_is info' -l backing-chain -d 'describe the image\'s bases as well'
complete -c qedimg -n '__qedimg_is info' -l allocation -d 'count the clusters of data and of zeros'
complete -c qedimg -n '__qedimg_is info' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is info' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is info' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is info' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is info' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is info' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is info' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is info' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is info' -F

complete -c qedimg -n '__qedimg_is check' -s f -x -a 'qed' -d 'the only format there is'
complete -c qedimg -n '__qedimg_is check' -s r -l repair -x -a 'leaks all' -d 'give back leaked space, or repair damage'
complete -c qedimg -n '__qedimg_is check' -l dry-run -d 'say what -r would do, and change nothing'
complete -c qedimg -n '__qedimg_is check' -l force -d 'repair also where that writes far more than the file has, or where hardly anything seems to be in use'
complete -c qedimg -n '__qedimg_is check' -l undo -r -F -d 'put back what a repair has changed, from its backup'
complete -c qedimg -n '__qedimg_is check' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is check' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is check' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is check' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is check' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is check' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is check' -F

complete -c qedimg -n '__qedimg_is create' -s f -x -a 'qed' -d 'the only format there is'
complete -c qedimg -n '__qedimg_is create' -s b -l base -r -F -d 'make an overlay over this file'
complete -c qedimg -n '__qedimg_is create' -s F -l base-format -x -a 'raw qed' -d 'what BASE is (a QED image tells)'
complete -c qedimg -n '__qedimg_is create' -s u -l unsafe -d 'do not look at the base, which need not be there; takes -F and SIZE'
complete -c qedimg -n '__qedimg_is create' -l cluster-size -x -d 'bytes in a cluster, a power of two from 4K to 64M (64K)'
complete -c qedimg -n '__qedimg_is create' -l table-size -x -d 'clusters in a table: 1, 2, 4, 8 or 16 (4)'
complete -c qedimg -n '__qedimg_is create' -s o -x -d 'the same as qemu-img has it: backing_file, backing_fmt, cluster_size, table_size, size'
complete -c qedimg -n '__qedimg_is create' -l preallocate -x -a 'off full' -d 'full: give each cluster a place in the file, and room on the host (off)'
complete -c qedimg -n '__qedimg_is create' -l force -d 'replace IMAGE if it is there and not in use'
complete -c qedimg -n '__qedimg_is create' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is create' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is create' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is create' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is create' -F

complete -c qedimg -n '__qedimg_is map' -s f -x -a 'qed raw' -d 'do not guess the format'
complete -c qedimg -n '__qedimg_is map' -s s -l start-offset -x -d 'begin here, not at the disk\'s beginning'
complete -c qedimg -n '__qedimg_is map' -s l -l max-length -x -d 'how much of the disk to list'
complete -c qedimg -n '__qedimg_is map' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is map' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is map' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is map' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is map' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is map' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is map' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is map' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is map' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is map' -F

complete -c qedimg -n '__qedimg_is convert' -s f -x -d 'what SOURCE is: raw or qed'
complete -c qedimg -n '__qedimg_is convert' -s O -x -d 'what TARGET is to be (qed)'
complete -c qedimg -n '__qedimg_is convert' -s B -l base -r -F -d 'make an overlay that holds what differs from BASE'
complete -c qedimg -n '__qedimg_is convert' -s F -l base-format -x -a 'raw qed' -d 'what BASE is (a QED image tells)'
complete -c qedimg -n '__qedimg_is convert' -l cluster-size -x -d 'bytes in a cluster, a power of two from 4K to 64M (64K)'
complete -c qedimg -n '__qedimg_is convert' -l table-size -x -d 'clusters in a table: 1, 2, 4, 8 or 16 (4)'
complete -c qedimg -n '__qedimg_is convert' -s o -x -d 'the same as qemu-img has it: backing_file, backing_fmt, cluster_size, table_size'
complete -c qedimg -n '__qedimg_is convert' -s S -x -d 'write zeros as data in runs shorter than this; 0: always (4K)'
complete -c qedimg -n '__qedimg_is convert' -s m -x -d 'pieces that are under way at once, 1 to 16 (4)'
complete -c qedimg -n '__qedimg_is convert' -s n -d 'write into TARGET, which is there and at least as large'
complete -c qedimg -n '__qedimg_is convert' -s t -x -a 'writeback unsafe' -d 'writeback: TARGET is on the host\'s disk when this ends; unsafe, as qemu-img does: whenever the host gets round to it (writeback)'
complete -c qedimg -n '__qedimg_is convert' -l compare -d 'read TARGET back before it gets its name'
complete -c qedimg -n '__qedimg_is convert' -l force -d 'replace TARGET if it is there and not in use'
complete -c qedimg -n '__qedimg_is convert' -s c -d 'refused: see qemu-img'
complete -c qedimg -n '__qedimg_is convert' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is convert' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is convert' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is convert' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is convert' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is convert' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is convert' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is convert' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is convert' -F

complete -c qedimg -n '__qedimg_is compare' -s f -x -a 'auto raw qed' -d 'what FIRST is'
complete -c qedimg -n '__qedimg_is compare' -s F -x -a 'auto raw qed' -d 'what SECOND is'
complete -c qedimg -n '__qedimg_is compare' -s s -l strict -d 'size and allocation count as well'
complete -c qedimg -n '__qedimg_is compare' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is compare' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is compare' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is compare' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is compare' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is compare' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is compare' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is compare' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is compare' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is compare' -F

complete -c qedimg -n '__qedimg_is measure' -l size -x -d 'measure a new disk'
complete -c qedimg -n '__qedimg_is measure' -s f -x -a 'raw qed' -d 'what SOURCE is'
complete -c qedimg -n '__qedimg_is measure' -s O -x -d 'raw or qed (qed)'
complete -c qedimg -n '__qedimg_is measure' -s B -l base -r -F -d 'make an overlay that holds what differs from BASE'
complete -c qedimg -n '__qedimg_is measure' -s F -l base-format -x -a 'raw qed' -d 'what BASE is (a QED image tells)'
complete -c qedimg -n '__qedimg_is measure' -l cluster-size -x -d 'bytes in a cluster, a power of two from 4K to 64M (64K)'
complete -c qedimg -n '__qedimg_is measure' -l table-size -x -d 'clusters in a table: 1, 2, 4, 8 or 16 (4)'
complete -c qedimg -n '__qedimg_is measure' -s o -x -d 'the same as qemu-img has it: backing_file, backing_fmt, cluster_size, table_size'
complete -c qedimg -n '__qedimg_is measure' -s S -x -d 'count zeros as data in runs shorter than this; 0: always (4K)'
complete -c qedimg -n '__qedimg_is measure' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is measure' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is measure' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is measure' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is measure' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is measure' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is measure' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is measure' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is measure' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is measure' -F

complete -c qedimg -n '__qedimg_is resize' -s f -x -a 'qed' -d 'the only format there is'
complete -c qedimg -n '__qedimg_is resize' -l shrink -d 'let the disk become smaller'
complete -c qedimg -n '__qedimg_is resize' -l force -d 'lose what the image holds past the new end, or past the old one'
complete -c qedimg -n '__qedimg_is resize' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is resize' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is resize' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is resize' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is resize' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is resize' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is resize' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is resize' -F

complete -c qedimg -n '__qedimg_is rebase' -s b -r -F -d 'the new base, seen from the image\'s directory; "" for none'
complete -c qedimg -n '__qedimg_is rebase' -s F -x -a 'raw qed' -d 'what the new base is; found out if it is QED'
complete -c qedimg -n '__qedimg_is rebase' -s f -x -a 'qed' -d 'the only format there is'
complete -c qedimg -n '__qedimg_is rebase' -s u -l unsafe -d 'change the name alone'
complete -c qedimg -n '__qedimg_is rebase' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is rebase' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is rebase' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is rebase' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is rebase' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is rebase' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is rebase' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is rebase' -F

complete -c qedimg -n '__qedimg_is commit' -s f -x -a 'qed' -d 'the only format there is'
complete -c qedimg -n '__qedimg_is commit' -s b -l base -r -F -d 'commit to this file of the chain, and not to the next; implies -d'
complete -c qedimg -n '__qedimg_is commit' -s d -l keep -d 'leave the overlay as it is, to be thrown away'
complete -c qedimg -n '__qedimg_is commit' -l backing -x -a 'confined any none' -d 'use backing files only from the directory of the image that names them, from anywhere, or not at all (confined)'
complete -c qedimg -n '__qedimg_is commit' -l backing-dir -x -a '(__fish_complete_directories)' -d 'allow backing files from DIR too (may be given again)'
complete -c qedimg -n '__qedimg_is commit' -l backing-format -x -a 'raw qed' -d 'what backing files are taken for, whatever is in them'
complete -c qedimg -n '__qedimg_is commit' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is commit' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is commit' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is commit' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is commit' -F

complete -c qedimg -n '__qedimg_is compact' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is compact' -s p -l progress -d 'show the progress also where stderr is no terminal'
complete -c qedimg -n '__qedimg_is compact' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is compact' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is compact' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is compact' -F

complete -c qedimg -n '__qedimg_is freelist' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is freelist' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is freelist' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is freelist' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is freelist' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is freelist' -a 'show on off'
complete -c qedimg -n '__qedimg_is freelist' -F

complete -c qedimg -n '__qedimg_is dump' -l output -x -a 'human json' -d 'text for people, or JSON with the keys that qemu-img has (human)'
complete -c qedimg -n '__qedimg_is dump' -s U -l force-share -d 'read beside a program that writes to the image; what is read may be torn'
complete -c qedimg -n '__qedimg_is dump' -s q -l quiet -d 'print nothing but errors'
complete -c qedimg -n '__qedimg_is dump' -s v -l verbose -d 'print what is being done'
complete -c qedimg -n '__qedimg_is dump' -s h -l help -d 'show help'
complete -c qedimg -n '__qedimg_is dump' -a 'header l1 l2'
complete -c qedimg -n '__qedimg_is dump' -F
