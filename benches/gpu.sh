#!/usr/bin/env bash
# Everything that only a GPU can show, in one run on a machine that has one; ends with a short table.
#
#   benches/gpu.sh pack DIR       here: builds the binaries (with nvcc) and puts them, and this script, into DIR
#   DIR/gpu.sh run [OUT]          there: needs a driver, and compute-sanitizer for its part; no Rust, no sources
#   DIR/gpu.sh --dry-run          prints what `run` would run
#
# OUT (default: results next to this script) gets the output of every part and table.txt, which belongs to
# benches/results as gpu-DATE.txt. The exit code is 0 only if every part passed; a part that cannot run there, such as
# compute-sanitizer or NCCL where they are not installed, is in the table as SKIPPED and does not fail the run.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Every stream of every rank makes progress beside the others.
export CUDA_DEVICE_MAX_CONNECTIONS=32
# The published shape: 8 ranks of one GPU, each with an eighth of its multiprocessors.
shape=(--ranks 8 --tokens 128 --hidden 7168 --experts 256 --topk 8)
# Far longer than any part takes on a healthy machine; a hung kernel ends here.
limit=300
dry=0
rows=()
failed=0

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

# pack DIR: builds, and copies what is needed there.
pack() {
  local dir=$1 root binary name
  root=$(cd "$here/.." && pwd)
  mkdir -p "$dir" || return 1
  cd "$root" || return 1
  cargo build --release --bin ibex || return 1
  local json
  json=$(cargo test --release --test cuda_device --no-run --message-format=json) || return 1
  # The newest line of cargo's report that names an executable of that test.
  binary=$(grep '"name":"cuda_device"' <<<"$json" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
  [[ -n $binary ]] || { echo "cargo did not say where the test lies" >&2; return 1; }
  cp "${CARGO_TARGET_DIR:-target}/release/ibex" "$dir/ibex" && cp "$binary" "$dir/cuda_device" || return 1
  cp "${BASH_SOURCE[0]}" "$dir/gpu.sh"
  name=$("$dir/ibex" info | sed -n 's/^cuda image *//p')
  echo "packed into $dir; kernels: $name"
  [[ $name != empty* ]] || { echo "no kernels to run: install nvcc, and pack again" >&2; return 1; }
}

# row NAME VERDICT SECONDS WHAT
row() {
  rows+=("$(printf '%-34s %-8s %6s s  %s' "$1" "$2" "$3" "$4")")
}

# value FILE LABEL: the first number behind a label at the start of a line.
value() {
  awk -v label="$2" '$1 == label { print $2; exit }' "$1"
}

# part NAME COMMAND...: runs it with a limit, keeps its output, remembers how it went.
part() {
  local name=$1 started=$SECONDS status=0 log
  shift
  if ((dry)); then
    printf '%-34s %s\n' "$name" "$*"
    return 0
  fi
  log=$out/$name.log
  printf '=== %s: %s\n' "$name" "$*"
  timeout "$limit" "$@" >"$log" 2>&1 || status=$?
  tail -n 4 "$log"
  local what
  what=$(grep -m 1 '^result' "$log" || tail -n 1 "$log")
  if ((status != 0)); then
    failed=1
    row "$name" "FAILED" $((SECONDS - started)) "exit $status: ${what:0:70}"
  elif grep -q '^SKIPPED' "$log"; then
    row "$name" "SKIPPED" $((SECONDS - started)) "$(grep -m 1 '^SKIPPED' "$log" | cut -c 1-70)"
  else
    row "$name" "ok" $((SECONDS - started)) "${what:0:70}"
  fi
}

# filtered NAME COMMAND...: a part that names tests; names that no test has are a failure, not a success.
filtered() {
  local name=$1
  part "$@"
  if ((!dry)) && ! grep -q '^running [1-9]' "$out/$name.log"; then
    failed=1
    row "$name" "FAILED" 0 "no test ran: its names have changed"
  fi
}

# optional NAME WHAT COMMAND...: a part that a machine without WHAT refuses with exit code 2 before it runs anything.
optional() {
  local name=$1 what=$2 status=0
  shift 2
  if ((!dry)); then
    timeout "$limit" "$@" --iters 1 --warmup 0 >"$out/$name.log" 2>&1 || status=$?
    if ((status == 2)) && grep -q "$what" "$out/$name.log"; then
      row "$name" "SKIPPED" 0 "$(grep -m 1 "$what" "$out/$name.log" | cut -c 1-70)"
      return 0
    fi
  fi
  timings "$name" "$@"
}

# judge NAME: what the run said of the device's own copies, and of somebody else's all-to-all; a copy that takes less
# of the kernels' time than its limit fails the run.
judge() {
  local name=$1 line
  while read -r line; do
    rows+=("$(printf '%-34s %s' "" "$line")")
  done < <(grep -E '^(copy|nccl) ' "$out/$name.log" | tr -s ' ')
  # copy OPERATION RATIO of the kernels' time, limit LEAST: ...
  if ! awk '$1 == "copy" { n++; if ($8 == "limit" && $3 < $9 + 0) low = 1 } END { exit low || n != 2 }' \
    <(tr -d ',' <"$out/$name.log"); then
    failed=1
    row "$name" "FAILED" 0 "the kernels take too long beside copies of the same bytes, or no copies were timed"
  fi
}

# timings NAME COMMAND...: a part whose latencies are kept in the summary, beside what copies of the same bytes take.
timings() {
  local name=$1
  part "$@"
  if ((!dry)) && [[ -e $out/$name.log ]]; then
    rows+=("$(printf '%-34s dispatch %s us, combine %s us (p50, slowest rank, CUDA events)' "" \
      "$(value "$out/$name.log" dispatch)" "$(value "$out/$name.log" combine)")")
    judge "$name"
  fi
}

# rates NAME COMMAND...: a part whose table is kept.
rates() {
  local name=$1 line
  part "$@"
  if ((!dry)) && [[ -e $out/$name.log ]]; then
    while IFS= read -r line; do
      rows+=("$(printf '%-34s %s' "" "$line")")
    done < <(grep -E '^( *[0-9]+ |bytes|method)' "$out/$name.log")
  fi
}

# What NVIDIA's sanitizer finds on small shapes.
sanitize() {
  local tool=$1 sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z $sanitizer ]] && ((!dry)); then
    row "sanitizer-$tool" "SKIPPED" 0 "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    return 0
  fi
  # Of the tests those that launch once at a time: ranks whose launches wait for each other would never end there.
  filtered "sanitizer-$tool" "${sanitizer:-compute-sanitizer}" --tool "$tool" --error-exitcode 9 \
    "$here/cuda_device" --nocapture --test-threads 1 the_selftest all_ranks_in_one_launch
}

machine() {
  "$here/ibex" doctor >"$out/doctor.log" 2>&1
  date -u '+%Y-%m-%d %H:%M UTC'
  local asked=name,driver_version,memory.total,clocks.sm
  nvidia-smi --query-gpu="$asked" --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  "$here/ibex" info | sed -n '1,6p'
}

run_all() {
  local bench=("$here/ibex" bench ep --gpu cuda)
  part info "$here/ibex" info
  filtered tests "$here/cuda_device" --nocapture --test-threads 1
  local dtype combine graph
  for dtype in bf16 fp8; do
    for combine in exact reduced; do
      for graph in "" --graph; do
        part "check-$dtype-$combine${graph:+-graph}" "${bench[@]}" --check ${graph:+"$graph"} --dtype "$dtype" \
          --combine "$combine" --route ibgda "${shape[@]}" --iters 5
      done
    done
  done
  part check-mapped-fp8-exact-graph "${bench[@]}" --check --graph --dtype fp8 --combine exact --route auto \
    "${shape[@]}" --iters 5
  part check-mapped-bf16-reduced-graph "${bench[@]}" --check --graph --dtype bf16 --combine reduced --route auto \
    "${shape[@]}" --iters 5
  local tool
  for tool in memcheck racecheck synccheck; do
    sanitize "$tool"
  done
  timings timings-mapped "${bench[@]}" --graph --route auto "${shape[@]}" --iters 200 --warmup 20
  timings timings-ibgda "${bench[@]}" --graph --route ibgda "${shape[@]}" --iters 50 --warmup 5
  optional baseline-nccl libnccl "${bench[@]}" --route auto "${shape[@]}" --baseline nccl
  rates post "$here/ibex" bench post --gpu cuda
  filtered replays-across-replacement "$here/cuda_device" replace_a_peer --nocapture
}

case ${1:-run} in
  pack)
    [[ $# -eq 2 ]] || usage
    pack "$2"
    exit
    ;;
  --dry-run)
    dry=1
    run_all
    exit
    ;;
  run) out=${2:-$here/results} ;;
  *) usage ;;
esac

mkdir -p "$out" || exit 2
if [[ ! -x $here/ibex || ! -x $here/cuda_device ]]; then
  echo "no binaries beside this script: see its first lines, at pack" >&2
  exit 2
fi
run_all
{
  machine
  echo
  printf '%s\n' "${rows[@]}"
} | tee "$out/table.txt"
exit "$failed"
