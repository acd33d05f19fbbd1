# shellcheck shell=bash
# Sourced by quickstart.sh and the recipes: steps that are done once, and training over several processes.

recipe=
steps_done=0
running_step=
UNFINISHED=75 # as sysexits.h has it: a command stopped in time and said so; the same command goes on
STEP_LOG=${STEP_LOG:-} # a file: what the commands of steps print goes there, and descriptors 3 and 4 are the terminal's

# step NAME OUTPUT COMMAND...: run COMMAND, which makes OUTPUT, unless the same commands up to here have made
# it before. With RESUMABLE=1, for what takes long, an interrupted COMMAND goes on with what it has left, and what
# another COMMAND made is put aside. ABOUT says what it is for.
step() {
    local name=$1 output=$2 started=$SECONDS aside
    shift 2
    recipe+="$*;"
    if [[ -e $output && -f $output.done && $(<"$output.done") == "$recipe" ]]; then
        echo "== $name: done before ($output)"
        return
    fi
    echo "== $name${ABOUT:+: $ABOUT}"
    running_step=$name
    rm -f "$output.done"
    if [[ ${RESUMABLE:-0} == 0 ]]; then
        rm -rf "$output"
    elif [[ -e $output && ! ( -f $output.begun && $(<"$output.begun") == "$recipe" ) ]]; then
        aside=$output.until-$(date +%Y%m%d-%H%M%S)-$$
        echo "   of other settings: $output is now $aside"
        mv "$output" "$aside"
    fi
    mkdir -p "$(dirname "$output")"
    echo "$recipe" >"$output.begun"
    if [[ -n $STEP_LOG ]]; then
        logged "$@"
    else
        "$@"
    fi
    mv "$output.begun" "$output.done"
    steps_done=$((steps_done + 1))
    running_step=
    echo "-- $name: $((SECONDS - started)) s"
}

# tell_end STATUS: the last line of a script that stopped in a step: which one, and how to go on.
tell_end() {
    [[ -z $running_step || $1 == "$UNFINISHED" ]] ||
        echo "stopped in the step '$running_step' with status $1; the same command goes on there" >&2
}
trap 'tell_end $?' EXIT

# logged COMMAND...: its output goes to STEP_LOG. Where it fails, `explain` knows it.
logged() {
    logged_command="$*"
    echo "== $logged_command" >>"$STEP_LOG"
    start_clock
    "$@" >>"$STEP_LOG" 2>&1
    stop_clock
    logged_command=
}
logged_command=

# explain: which logged command failed, and what it said last. For a trap on EXIT, which may begin while the command's
# descriptors are still the log's.
explain() {
    local status=$?
    set +e
    stop_clock
    if [[ -n $logged_command ]]; then
        {
            echo "failed: $(cut -c 1-300 <<<"$logged_command")"
            grep -aE '^(rank [0-9]+: )?[a-z_.]+: error: |^megatron_fdd: rank [0-9]+ failed: ' "$STEP_LOG" | tail -n 2
            echo "the last lines of $STEP_LOG:"
            tail -n 15 "$STEP_LOG" | cut -c 1-200 | sed 's/^/    /'
        } >&4
    fi
    tell_end "$status" 2>&4
}

# On a terminal a running clock; nothing in a pipe.
start_clock() {
    [[ -t 3 ]] || return 0
    (
        began=$SECONDS
        while sleep 1; do printf '\r   %d s%s' $((SECONDS - began)) "${EXPECTED_S:+ of about $EXPECTED_S}" >&3; done
    ) &
    clock=$!
}
clock=

stop_clock() {
    [[ -n $clock ]] || return 0
    kill "$clock" 2>/dev/null || true
    wait "$clock" 2>/dev/null || true
    clock=
    printf '\r\033[K' >&3
}

# show COMMAND...: print it as it could be typed, and run it.
show() {
    printf '%q ' "$@"
    echo
    "$@"
}

# launch ARGUMENTS...: torchrun with RANKS processes on this machine.
launch() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / RANKS))
    show env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" \
        torchrun --standalone --nproc-per-node "$RANKS" "$@"
}
