#!/usr/bin/env bash
# Runs a training command, and again from its last checkpoint when it fails:
#
#     ./launch/supervise.sh ./launch/finetune.sh --output_dir runs/finetune --train_data groups.jsonl [further flags]
#
# --resume_from_checkpoint auto is added unless it is there (or the flags are in a .json file, which must then hold it).
# MAX_RESTARTS (3) restarts in a row that got no further than the one before end it: a newer checkpoint starts the count anew.
# RESTART_DELAY (10) seconds pass before each. Not started again: a run that is done (0), a user's mistake (2), a run stopped by
# a signal (75) or diverged (77), and a command that is not there (126, 127). The exit status is the command's last, and 75 after
# a signal that came before there was anything to save, or that the run did not answer to as it should.
# --overwrite_output_dir counts only where the folder has no checkpoint to resume from.
# SIGTERM and SIGUSR1 go to the ranks on this machine, which save and end with 75, and so does the end of the terminal (nohup
# and tmux keep a run beyond it); Ctrl-C goes to all processes of the run.
# Ranks that pdsh started are not among them, not even this machine's: signal one of those (any one) itself.
set -uo pipefail
if [ $# -eq 0 ]; then
    echo "error: no command; give one, such as ./launch/supervise.sh ./launch/finetune.sh --output_dir runs/finetune" >&2
    exit 2
fi
max_restarts=${MAX_RESTARTS:-3} delay=${RESTART_DELAY:-10}
command=("$@") output="" resumes="" previous=""
for word in "$@"; do
    case $previous in --output_dir | --output-dir) output=$word ;; esac
    case $word in
        --output_dir=* | --output-dir=*) output=${word#*=} ;;
        --resume_from_checkpoint* | --resume-from-checkpoint*) resumes=yes ;;
    esac
    previous=$word
done
if [ -n "$output" ] && [ -z "$resumes" ]; then
    command+=(--resume_from_checkpoint auto)
    resumes=auto
fi
notes=$(mktemp -d) || exit 1
trap 'rm -rf "$notes"' EXIT

say() { echo "supervise: $*" >&2; }

newest() { # the step of the last whole checkpoint
    local file step last=0
    for file in "$output"/checkpoint-*/state.json; do
        step=${file%/state.json} && step=${step##*/checkpoint-}
        [[ -e $file && $step =~ ^[0-9]+$ ]] && ((step > last)) && last=$step
    done
    echo "$last"
}

members() { # "pid parent" of each process of the run's session
    local file line state parent owner
    [ -s "$notes/session" ] || return
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue
        read -r state parent _ owner _ <<<"${line##*) }"
        [ "$owner" = "$(<"$notes/session")" ] && [ "$state" != Z ] && echo "${line%% *} $parent"
    done
}

has_rank() { { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null | grep -q '^RANK='; }

asked="" pending=""
forward() { # to the ranks, not to what they or their launcher have started; the `deepspeed` command would just die of it
    local pid parent all to=()
    asked=$1 pending=$1
    mapfile -t all < <(members)
    for pid in "${all[@]}"; do
        parent=${pid#* } pid=${pid% *}
        has_rank "$pid" && ! has_rank "$parent" && to+=("$pid")
    done
    [ ${#to[@]} -eq 0 ] && [ ${#all[@]} -gt 0 ] && to=("$(<"$notes/session")")
    [ ${#to[@]} -eq 0 ] && return # nobody there yet: once more, later
    pending=""
    say "$1 goes to ${to[*]}"
    kill -s "${1#SIG}" "${to[@]}" 2>/dev/null
}

end_all() { # what is left of the session: SIGTERM for ten seconds, then SIGKILL
    local signal pids
    for signal in TERM KILL; do
        for _ in {1..20}; do
            mapfile -t pids < <(members)
            [ ${#pids[@]} -eq 0 ] && return
            kill -s $signal "${pids[@]% *}" 2>/dev/null
            sleep 0.5
        done
    done
}

ranks_left() { # whether a rank of the run (not what it has started) is still there a second after its launcher's end
    local pid
    [ -z "$output" ] && return 1
    sleep 1
    for pid in $(members | cut -d ' ' -f 1); do
        has_rank "$pid" && grep -qaF -- "$output" "/proc/$pid/cmdline" 2>/dev/null && return
    done
    return 1
}

stopped() { # ends where a signal has asked for it
    [ -z "$asked" ] && return
    say "status $status after $asked: not started again"
    [ "$asked" = SIGINT ] && exit "$status"
    exit 75
}

start() { # the command, in a session of its own: so its processes are known even when their parents are gone
    rm -f "$notes"/*
    (
        trap '' HUP INT TERM USR1 # for the command, which gets them back, and whose status is to be noted
        setsid env --default-signal=HUP,INT,TERM,USR1 \
            bash -c 'echo $$ >"$0/session"; exec "$@"' "$notes" "${command[@]}"
        echo $? >"$notes/status"
    ) &
    wrapper=$!
}

trap 'forward SIGTERM' TERM HUP
trap 'forward SIGUSR1' USR1
trap 'asked=SIGINT; [ -s "$notes/session" ] && kill -s INT -- "-$(<"$notes/session")" 2>/dev/null' INT
reached=$(newest) restarts=0
while :; do
    start
    while kill -0 "$wrapper" 2>/dev/null; do # `wait` may lose the status when a trap interrupts it
        [ -n "$pending" ] && forward "$pending"
        sleep 0.5
    done
    status=$(cat "$notes/status" 2>/dev/null || echo 1)
    if [ "$status" = 0 ] && ranks_left; then
        say "the command says that it is done, and its ranks are still there: its launcher has died"
        status=1
    fi
    end_all
    case $status in 0 | 2 | 75 | 77 | 126 | 127) exit "$status" ;; esac
    stopped # 138 and 143: SIGUSR1 or SIGTERM to a run that did not listen yet
    [[ $status = 138 || $status = 143 ]] && exit 75
    now=$(newest)
    if ((now > reached)); then
        reached=$now restarts=0
        if [ "$resumes" = yes ]; then # a path, which is behind this run's own checkpoints now
            command+=(--resume_from_checkpoint auto)
            resumes=auto
        fi
    fi
    if ((restarts >= max_restarts)); then
        say "status $status after $restarts restarts that got no further than step $reached: giving up"
        exit "$status"
    fi
    ((restarts += 1))
    say "status $status; restart $restarts of $max_restarts from step $reached in $delay s"
    for ((passed = 0; passed < delay; passed++)); do
        sleep 1
        stopped
    done
done
