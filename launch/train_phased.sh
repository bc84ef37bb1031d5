#!/usr/bin/env bash
# Looks whether a run can work, waits five seconds, and starts it, or goes on with it:
#
#     launch/train_phased.sh -c run.yaml
#
# look (phased-cpt preflight) ─ 5 s to abort ─ phased-cpt run ─→ the terminal, and logs/launch.log of the run's folder
#
# What stands in a configuration is read by phased_cpt alone; here it is a word that is passed on, and never a command.
set -u -o pipefail

ABORT_SECONDS=5
TEE_SECONDS=5 # for the last lines, where something else that was started keeps the pipe open

show_help() {
  cat <<'HELP'
Usage: train_phased.sh [-c CONFIG] [-y] [--check-only] [--num-gpus N] [options of `phased-cpt run`]

Looks whether the run can work and shows what it would do (phased-cpt preflight), waits 5 seconds, and starts it
(phased-cpt run); a run that was stopped goes on. Everything is also in logs/launch.log of the run's folder.

  -c, --config CONFIG   the configuration: a YAML or JSON file, or the name of a shipped one
  -y, --yes             start at once, without the 5 seconds
  --check-only          look, and start nothing
  --num-gpus N          GPUs of this machine to train on (launch.num_gpus)
  -h, --help            this

All other options are those of `phased-cpt run` (its -h explains them): --set KEY=VALUE, --run-dir, --new, --until …
On several nodes, on each of them: --nnodes N --node-rank K --master-addr HOST --master-port PORT; those with a rank
above 0 look at nothing and wait for nothing, and log to launch-node<K>.log in the folder that one is in.

Exit status: that of `phased-cpt run` (0 done, 2 input, 3 preflight, 4 the ledger refuses, 5 diverged, 6 a gate is
closed, 75 stopped: the same command goes on), or 130 when it was aborted before anything was started.
HELP
}

main() {
  require_bash
  read_words "$@"
  find_python
  [[ $stays == yes || $only_look == yes ]] || exec "${phased_cpt[@]}" run "${words[@]}"
  child='' heard='' looked=''
  trap 'hear INT' INT
  trap 'hear TERM' TERM
  trap 'hear HUP' HUP
  trap : PIPE # who reads here may leave, as `| head` does: the run goes on
  if ((node_rank > 0)); then
    launch "launch-node$node_rank.log" "${words[@]}"
  fi
  find_folder
  if [[ $only_look == yes || ($state != finished && $state != running) ]]; then
    look
    [[ $only_look == no ]] || exit 0
    [[ $at_once == yes ]] || count_down
  fi
  launch "$folder/logs/launch.log" "${words[@]}" --run-dir "$folder"
}

require_bash() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail 1 "bash 4.4 or newer is needed; this is $BASH_VERSION"
}

fail() { # exit status, message
  printf 'train_phased.sh: %s\n' "$2" >&2
  exit "$1"
}

# What is typed ---------------------------------------------------------------------------------------------------------

# Into `words`, for `phased-cpt run`; into `asked`, those that preflight takes as well; and what is for this program.
read_words() {
  words=() asked=() at_once=no only_look=no stays=yes node_rank=0
  while (($#)); do
    case $1 in
      -h | --help) show_help && exit 0 ;;
      -y | --yes) at_once=yes ;;
      --check-only) only_look=yes ;;
      --node-rank=*) words+=("$1") && read_node_rank "${1#*=}" ;;
      --node-rank) require_value "$@" && words+=("$1" "$2") && read_node_rank "$2" && shift ;;
      -c | --config | --set | --run-dir | --redo-from | --launcher | --hostfile | --num-gpus | --nnodes | --master-addr | \
        --master-port) require_value "$@" && of_both "$1" "$2" && shift ;;
      -c?* | --config=* | --set=* | --run-dir=* | --redo-from=* | --launcher=* | --hostfile=* | --num-gpus=* | --nnodes=* | \
        --master-addr=* | --master-port=*) of_both "$1" ;;
      --dry-run | --smoke | --merge-only) words+=("$1") && stays=no ;; # nothing is trained that stays
      [!-]*)
        # The value of an option that stands before it, or a file, of which phased-cpt tells how it is named.
        if ((${#words[@]})) || [[ $1 =~ \.(ya?ml|json)$ ]]; then
          words+=("$1")
        elif [[ $1 != run ]]; then
          fail 2 "this starts a run; type: phased-cpt $1 -h"
        fi
        ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

of_both() {
  words+=("$@") asked+=("$@")
}

# Preflight has no options for several nodes: --master-addr is launch.master_addr there.
require_value() {
  (($# > 1)) || fail 2 "$1 needs a value behind it (-h explains it)"
}

read_node_rank() {
  [[ $1 =~ ^[0-9]{1,6}$ ]] || fail 2 "--node-rank $1: the number of this node is needed, 0 for the first"
  node_rank=$((10#$1))
}

# What there is ---------------------------------------------------------------------------------------------------------

# The Python of the activated environment, of the repository, or of the system: the first that has phased_cpt.
find_python() {
  local here repository python tried=
  here=$(readlink -f -- "${BASH_SOURCE[0]}") && repository=${here%/*/*}
  for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
    "$repository/.venv/bin/python" "$(type -P python3)"; do
    [[ -n $python ]] || continue
    # -P: of the folder that one stands in, no queue.py or phased_cpt is taken for the real one.
    phased_cpt=("$python" -P -m phased_cpt)
    [[ -x $python ]] && "$python" -P -c 'import phased_cpt.cli' 2>/dev/null && return
    tried+="    $python"$'\n'
  done
  fail 1 "phased_cpt cannot be imported by any of
$tried  activate the environment that it is installed in (source …/bin/activate), or install it:
    make -C $(printf %q "$repository") install"
}

# Where the run is, or would be: `state` and `folder`. What cannot be used is told here, before anything is looked at.
find_folder() {
  local facts
  facts=$("${phased_cpt[@]}" run "${words[@]}" --dry-run --json </dev/null) || exit
  local shown='import json, os, sys
run = json.load(sys.stdin)["run"]
for fact in (run["state"], run["run_dir"]):
    sys.stdout.buffer.write(os.fsencode(fact) + b"\0")'
  {
    IFS= read -r -d '' state
    IFS= read -r -d '' folder
  } < <("${phased_cpt[0]}" -I -c "$shown" <<<"$facts")
  [[ -n $folder ]] || fail 1 "phased-cpt run --dry-run --json has named no run folder"
}

# Before the start ------------------------------------------------------------------------------------------------------

look() {
  local colours=()
  looked=$(mktemp) || fail 1 "no temporary file can be made; make room, or set TMPDIR"
  trap 'rm -f -- "$looked"' EXIT
  # The terminal is behind a pipe: preflight is told that it is there, and how wide.
  [[ ! -t 1 ]] || colours=(env FORCE_COLOR=1 "COLUMNS=$(tput cols 2>/dev/null || echo 80)")
  # The folder is named, for of --new preflight knows nothing.
  run_into "$looked" "${colours[@]}" "${phased_cpt[@]}" preflight "${asked[@]}" --run-dir "$folder"
  child=''
  [[ -z $heard ]] || nothing_was_started
  ((code == 0)) || fail "$code" "nothing was started"
}

count_down() {
  local left
  [[ -t 0 ]] || printf 'no terminal to ask in: it starts by itself (-y starts at once)\n'
  for ((left = ABORT_SECONDS; left > 0; left--)); do
    if [[ -t 1 ]]; then
      printf '\rstarts in %d s; Ctrl-C aborts ' "$left"
    else
      printf 'starts in %d s\n' "$left"
    fi
    sleep 1
  done
  [[ ! -t 1 ]] || printf '\r\033[K'
}

nothing_was_started() {
  trap '' INT TERM HUP
  printf '\nstopped (SIG%s): nothing was started\n' "$heard" >&2
  exit $((128 + $(kill -l "$heard")))
}

# The run ---------------------------------------------------------------------------------------------------------------

launch() { # log, words of the run
  local log=$1
  shift
  begin_log "$log" "$@"
  trap 'hear USR1' USR1
  run_into "$log" "${phased_cpt[@]}" run "$@"
  printf '# exit status %d\n' "$code" >>"$log"
  exit "$code"
}

begin_log() { # log, words of the run
  local log=$1
  shift
  mkdir -p -- "$(dirname -- "$log")" || fail 1 "the folder of the log cannot be made; nothing was started"
  {
    printf '# %s, in %q\n# ' "$(date -Iseconds)" "$PWD"
    printf '%q ' "${phased_cpt[@]}" run "$@"
    printf '\n'
    # What preflight has shown, without the colours.
    [[ -z $looked ]] || sed $'s/\x1b\\[[0-9;]*[a-zA-Z]//g' -- "$looked"
  } >>"$log" || fail 1 "$log cannot be written; nothing was started"
  [[ -z $looked ]] || rm -f -- "$looked"
  printf 'log: %s\n' "$log"
}

# A program, shown and written down --------------------------------------------------------------------------------------

# Of its own group, so that a Ctrl-C reaches this script alone, which passes it on once; and asked to stop, with a
# checkpoint, when this script is killed: 1 is PR_SET_PDEATHSIG.
STARTED='import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.setpgid(0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
os.execvp(sys.argv[2], sys.argv[2:])'

run_into() { # file to append to, command; its exit status is in `code`
  local file=$1 pipe writer
  shift
  child=starting heard='' code=1
  # No signal ends the writer before it has written all; nor does it end when nobody reads here any more (-p).
  exec {pipe}> >(trap '' INT TERM HUP QUIT USR1 && exec tee -p -a -- "$file")
  writer=$!
  (
    trap - INT TERM HUP QUIT USR1 # bash lets what is in the background ignore a Ctrl-C
    exec "${phased_cpt[0]}" -I -c "$STARTED" $$ "$@"
  ) >&"$pipe" 2>&1 </dev/null {pipe}>&- &
  child=$!
  [[ -z $heard ]] || kill -s "$heard" "$child"
  exec {pipe}>&-
  wait_for_child
  child=ended
  wait_for_writer "$writer"
}

# shellcheck disable=SC2329 # the traps call it
hear() { # signal
  heard=$1
  case $child in
    '') nothing_was_started ;;
    starting | ended) ;;
    *) kill -s "$1" "$child" 2>/dev/null ;;
  esac
}

# Not in `wait`: a signal that comes while bash is in there, as the child ends, may lose its exit status for good.
wait_for_child() {
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2
  done
  wait "$child"
  code=$?
}

wait_for_writer() { # process
  local left
  for ((left = TEE_SECONDS * 10; left > 0; left--)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
}

main "$@"
