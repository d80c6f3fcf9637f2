# Sourced by the scripts: steps with their time, and two lanes. One small model leaves half of two cores idle, so independent
# work runs in two lanes of half the cores each: `beside NAME COMMAND...` starts the second one, its output in $logs/NAME.log;
# `join` waits for it. `say COMMAND...` prints a command and runs it. With $dry set, commands are printed, not run, and nothing
# runs beside. On Linux without a card commands are forks of one process that has imported the libraries, and each begins some
# eight seconds earlier: `warm` starts the script anew with such a process around it (workflow/warm.py); with
# ABF_WARM set and empty it does not.
cores=$(nproc); half=$((cores > 1 ? cores / 2 : 1))
start=$SECONDS
warm() { # WORDS..: those that the script was started with
  [ -n "${dry:-}" ] || [ -n "${ABF_WARM+set}" ] || exec python -m workflow.warm --around bash "scripts/${0##*/}" "$@"
}
run() { # python FILE.py FLAGS.., or any other command
  case ${ABF_WARM:-}${1##*/},${2:-} in
    /*python,*.py) python -m workflow.warm "$ABF_WARM" "${@:2}" ;;
    *) "$@" ;;
  esac
}
say() { printf '$'; printf ' %q' "$@"; printf '\n'; [ -n "${dry:-}" ] || run "$@"; }
step() { printf '\n== [%4d s] %s\n' $((SECONDS - start)) "$*"; }
beside() {
  lane=$logs/$1.log; shift
  printf '(beside it: %s; output in %s)\n' "$*" "$lane"
  if [ -n "${dry:-}" ]; then "$@"; return; fi
  mkdir -p "$logs"
  # a group of its own, so that whatever it runs can be ended with it
  set -m; "$@" >"$lane" 2>&1 & beside_pid=$!; set +m
}
join() {
  [ -z "${dry:-}" ] || return 0
  wait "$beside_pid" && beside_pid='' || { tail -n 20 "$lane" >&2; echo "error: see $lane" >&2; exit 1; }
}
beside_pid=''
trap '[ -z "$beside_pid" ] || kill -- "-$beside_pid" 2>/dev/null || true' EXIT
