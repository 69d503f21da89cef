#!/bin/bash
# One training run on this machine by torchrun, restarted until it is done; or, started on each of
# several nodes, one attempt of it. `leyden train` does the same; this is for where only a shell
# script is wanted. From the folder that holds launch/:
#
#   RUN=first NPROC=2 bash launch/templates/torchrun.sh --config tiny --data.url data/corpus
#
#   RUN           name of the run: its folder is $RUN_ROOT/$RUN (needed)
#   RUN_ROOT      folder of runs (runs)
#   TARGET        a module, or a .py file (recipes.pretrain)
#   NPROC         ranks of this machine (its GPUs, 1 without)
#   MAX_RESTARTS  how often to start again after a failure (3); by the rules of launch/policy.py,
#                 three attempts without a new checkpoint are the last
#   CODE          folder that holds the rooms dist, recipes, launch (the current one)
#   PYTHON        interpreter ($CODE/.venv/bin/python, else python3)
#   NNODES        nodes; with more than 1, on each of them, and without restarts (1):
#   RDZV            HOST:PORT, the first node as all reach it, a port below 32768
#   NODE_RANK       0 on the first node
#   LOCAL_ADDR      address of this node
#
# Exit codes are the run's: 0 done, 2 usage, 3 data refused, 75 stopped and resumable, 93 never again.
set -uo pipefail
: "${RUN:?set RUN to the name of the run}" "${RUN_ROOT:=runs}"
RUN_DIR=$(realpath -m -- "$RUN_ROOT/$RUN")
CODE=$(realpath -- "${CODE:-.}")
[ -x "${PYTHON:=$CODE/.venv/bin/python}" ] || PYTHON=python3
if [ -z "${NPROC:-}" ]; then NPROC=$(ls -d /dev/nvidia[0-9]* 2>/dev/null | wc -l); fi
[ "$NPROC" -ge 1 ] || NPROC=1
TARGET=${TARGET:-recipes.pretrain}
NNODES=${NNODES:-1}
export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" LEYDEN_RUN_DIR="$RUN_DIR"
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='${role_name}' # no prefix (launch/agent.py)
export LEYDEN_LAUNCH_ID="$$.$EPOCHSECONDS" LEYDEN_NUM_RANKS=$((NNODES * NPROC))
CORES=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > NPROC ? CORES / NPROC : 1))}"
case $TARGET in *.py) WHAT=() ;; *) WHAT=(-m) ;; esac
WHAT+=(-- "$TARGET" "$@" --run_root "$RUN_ROOT" --run "$RUN") # last: a --config may hold others

if [ "$NNODES" = 1 ]; then
  MEET=(--standalone --local-addr=127.0.0.1)
else
  MAX_RESTARTS=0
  case ${RDZV:?set RDZV to HOST:PORT of the first node} in
    localhost:*|127.0.0.1:*|\[::1\]:*)
      echo "error: RDZV=$RDZV: every node would take itself for the first one" >&2; exit 2 ;;
  esac
  [ "${NODE_RANK:?set NODE_RANK: 0 on the first node}" = 0 ] && IS_HOST=1 || IS_HOST=0
  MEET=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id="$RUN" --rdzv-endpoint="$RDZV"
    --rdzv-conf="is_host=$IS_HOST,join_timeout=300,read_timeout=300"
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"})
fi

# One agent; a signal reaches it while this shell waits, and its ranks save and end.
AGENT= ASKED=
stop() { ASKED=1; [ -z "$AGENT" ] || kill -TERM "$AGENT" 2>/dev/null; }
trap stop TERM INT HUP
agent() {
  "$PYTHON" -m launch.agent "${MEET[@]}" --nproc-per-node="$NPROC" --max-restarts=0 "$@" \
    "${WHAT[@]}" </dev/null &
  AGENT=$!
  while kill -0 "$AGENT" 2>/dev/null; do wait "$AGENT"; done # a trap interrupts wait
  wait "$AGENT"; RC=$?; AGENT=
}
if [ "$NNODES" != 1 ]; then
  agent; exit "$RC"
fi

mkdir -p -- "$RUN_DIR/attempts" "$RUN_DIR/control" || exit 4
rm -f -- "$RUN_DIR/control/drain"
for ((STARTS = 0; ; STARTS++)); do
  ATTEMPT=$(cd -- "$RUN_DIR/attempts" && ls | sort -n | tail -n1)
  ATTEMPT=$((${ATTEMPT:--1} + 1))
  FOLDER=$RUN_DIR/attempts/$ATTEMPT
  mkdir -- "$FOLDER" || exit 4
  mkdir -- "$FOLDER/ended"
  hostname > "$FOLDER/nodes"
  export LEYDEN_ATTEMPT="$ATTEMPT" NPROC
  "$PYTHON" -m launch.policy --start "$RUN_DIR" "$ATTEMPT"
  agent --log-dir="$FOLDER/logs/$(hostname)" --tee=3
  echo "$RC" > "$FOLDER/ended/0"
  # What a restart cannot mend, and what was asked for.
  case $RC in 0|2|3|4|75|93) exit "$RC" ;; esac
  [ -z "$ASKED" ] || exit "$RC"
  [ "$STARTS" -lt "${MAX_RESTARTS:-3}" ] || exit "$RC"
  "$PYTHON" -m launch.policy "$RUN_DIR" "$ATTEMPT" "$RC"
  VERDICT=$?
  case $VERDICT in 75|76) [ ! -e "$RUN_DIR/control/drain" ] || exit 75 ;; *) exit "$VERDICT" ;; esac
done
