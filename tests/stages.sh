# shellcheck shell=bash
# Runs the stages of tests/run.sh, some of them side by side; source it, do not run it.
#
# A stage is a function.  What it prints is kept and printed whole at its end, so the output of two
# stages is never mixed.  A stage that fails stops no other.

# lane STAGE...: run stages one after the other.
lane() {
    local stage code seconds
    for stage in "$@"; do
        seconds=$SECONDS code=0
        echo "== Started: ${stage//_/ }"
        set +e
        (
            trap 'times >"$stages/$stage.times"' EXIT
            set -e
            "$stage"
        ) >"$stages/$stage.log" 2>&1 </dev/null
        code=$?
        set -e
        printf '%s %s %s\n' "$code" "$((SECONDS - seconds))" "$(processor_seconds "$stage")" \
            >"$stages/$stage.result"
        {
            flock 9
            say "${stage//_/ }"
            cat "$stages/$stage.log"
        } 9>"$stages/lock"
    done
}

# processor_seconds STAGE: print how many seconds of processor time the programs of a stage took.
processor_seconds() {
    # The last line of times is about the children: "1m2.345s 0m1.234s".
    tail -n 1 "$stages/$1.times" |
        awk '{ for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); sum += 60 * t[1] + t[2] }
               printf "%.0f", sum }'
}

# run_lanes LANE...: run lanes side by side, each a string of stages, and print a summary; fails if
# a stage failed.
run_lanes() {
    local lane stage code seconds processor failed=0 words=()
    stages=$(mktemp -d)
    trap 'rm -rf "$stages"' EXIT
    set -m # each lane is a process group, which is ended with all programs that it has started
    for lane in "$@"; do
        read -r -a words <<<"$lane"
        lane "${words[@]}" </dev/null &
        lanes+=("$!")
    done
    set +m
    trap 'end_lanes; exit 130' INT
    trap 'end_lanes; exit 143' TERM
    wait
    say "Stages"
    printf '%-28s %-8s %8s %12s\n' '' result seconds 'processor s'
    read -r -a words <<<"$*"
    for stage in "${words[@]}"; do
        code=none seconds='' processor=''
        [ ! -e "$stages/$stage.result" ] ||
            read -r code seconds processor <"$stages/$stage.result"
        [ "$code" = 0 ] || failed=1
        printf '%-28s %-8s %8s %12s\n' "${stage//_/ }" \
            "$([ "$code" = 0 ] && echo passed || echo FAILED)" "$seconds" "$processor"
    done
    return "$failed"
}

# end_lanes: end the programs of all lanes.
end_lanes() {
    local pid
    trap '' INT TERM
    for pid in "${lanes[@]}"; do
        kill -TERM -- "-$pid" 2>/dev/null || true
    done
    wait
}
stages='' lanes=()
