#!/usr/bin/env bash
# Finds the heads of SmolLM2-135M-Instruct that follow emphasis, for the paper's tasks, and compares
# them with other ways to emphasise. Two hours on two CPU cores; run it again to resume.
#
#   experiments/find_heads.sh [BIN]      BIN: folder of vllm-pasta and python (default: .venv/bin)
#
# VLLM_PASTA_DATA names the folder with counterfact.jsonl and the other public files; for tasks
# without a file there, examples are generated.
#
# Writes heads/, each head set with its report (.md), heat maps (.png) and answers (.jsonl):
#   TASK.json              the best number of heads for one task, chosen on held-out examples
#   json-20.json           20 heads for JSON, found with the paper's alpha of 0.01
#   multi.json             one set for several tasks: the union of each one's first 10 heads
#   counterfact-full.json  CounterFact again, by the full search instead of gradients
#   by-number.png          score and fluency by number of heads
#   eval-TASK.jsonl        each task on unseen examples, all ways; the table goes to eval-TASK.md
set -euo pipefail
cd "$(dirname "$0")/.."
readonly bin=${1:-.venv/bin}
readonly baselines=zero-shot,starred,quoted,few-shot

# Generated answers are dear, so heads are ranked by the ideal answer's log-probability: gradients
# estimate every head, and vLLM verifies the first sixteenth.
profile() { "$bin/vllm-pasta" profile --search gradient --likelihood --examples 40 "$@"; }

# evaluate NAME OPTIONS…: the table is shown and kept.
evaluate() {
  "$bin/vllm-pasta" eval --generations 100 --markdown --out "heads/$1.jsonl" "${@:2}" |
    tee "heads/$1.md"
}

mkdir -p heads
for task in json pronouns biasbios counterfact; do
  profile --tasks $task --alpha 0.1 --top-k auto --out heads/$task.json
done
profile --tasks json --top-k 20 --out heads/json-20.json
profile --tasks json,biasbios,counterfact --alpha 0.1 --select union --top-k 10 \
  --out heads/multi.json
"$bin/vllm-pasta" profile --tasks counterfact --top-k auto --out heads/counterfact-full.json

"$bin/python" -m benchmarks.heads heads/{json,pronouns,biasbios,counterfact}.json \
  --out heads/by-number.png

for name in json-20 pronouns biasbios counterfact; do
  evaluate eval-$name --tasks "${name%-*}" --alpha 0.1 \
    --methods "$baselines,heads/$name.json,heads/multi.json"
done
evaluate eval --tasks counterfact --examples 500 \
  --methods "$baselines,all,layers:20-24,heads/counterfact-full.json" \
  --head-counts 1,3,8,12,20,50,100 --plots heads/eval.png
