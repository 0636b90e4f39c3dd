#!/usr/bin/env bash
# Answer every open GPU question on one GPU, in parts of at most nine minutes:
#
#     bash benchmarks/gpu.sh [OUT [PART ...]]
#
# OUT: folder for logs, rows (JSON) and images, default gpu_results.
# PART: names of parts below; default: all of them, which take most of an hour.
#
# It needs Python with jax (CUDA), flax, optax and orbax-checkpoint, and the lighter packages of
# requirements.txt (carry them as wheels to a machine without a network). Columns of peers also need
# PyTorch (CUDA), diffusers and transformers; without them those columns stay empty.
# Each part prints its own table and has its own time limit. A failing part does not stop the next.
# docs/results/speed.md has the results so far, on an H100 and an H200.
# Run one part at a time: compilers search for the fastest of several programs on the GPU, and
# several of them at once take many times as long. On an H200 one 0.6B image with both peers took
# 160 s, 40 to 60 of them compiling ours. One pair of training_600m took 90 to 140 s, mostly
# compiling. The most important parts for 15 minutes: depthwise_tests latency_06b_now
# training_600m_unrolled training_600m_now throughput_06b_now latency_16b_now main_shapes_64 tiles
# latency_06b
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
shift || true
chosen=" $* "
mkdir -p "$out"
# Parts share compiled programs. In a second run, seconds of compiling are those of reading them.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$out" && pwd)/xla}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS
  if [ "$chosen" != "  " ] && [[ "$chosen" != *" $name "* ]]; then return; fi
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then result=ok; else result="FAILED ($?)"; fi
  printf '%-24s %-12s %4d s\n' "$name" "$result" $((SECONDS - begin)) | tee -a "$out/table.txt"
  tail -n 15 "$out/$name.log"
}

# Check first that every chosen part is one of those below, and that there is a GPU.
for name in $chosen; do
  if ! grep -qE "^ *(XLA_FLAGS=\S+ )?(part|bench|ours) $name " benchmarks/gpu.sh; then
    echo "error: no part $name: use names of parts in benchmarks/gpu.sh" >&2
    exit 2
  fi
done
if ! $python -c 'import jax; assert jax.default_backend() == "gpu"' 2>/dev/null; then
  echo "error: JAX sees no GPU here: install jax[cuda12], or pass its Python as PYTHON=" >&2
  exit 2
fi
$python -c 'import jax; print("jax", jax.__version__, jax.devices())' | tee -a "$out/table.txt"

# Correctness first: the numeric tests, compiled for the accelerator. float32 products are float32,
# as in the tests' references, and the compiler does not search for the fastest program.
tests=(env JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false
  XLA_FLAGS=--xla_gpu_autotune_level=0
  $python -m pytest -q -p no:cacheprovider -n 6 --dist load)
# Not yet run on a GPU: depthwise kernels with fused multiply-adds.
part depthwise_tests 60 "${tests[@]}" tests/ops/test_kernels.py -k test_depthwise
# 114 s on an H200.
part kernel_tests 240 "${tests[@]}" tests/ops/test_kernels.py
part numeric_tests 540 "${tests[@]}" \
  tests/diffusion/test_flow_trigflow.py tests/diffusion/test_scm.py tests/diffusion/test_ladd.py \
  tests/diffusion/test_samplers.py tests/models/test_linear_dit.py tests/models/test_controlnet.py \
  tests/ops/test_products.py tests/objectives/test_steps.py
# Published sizes with random weights, against diffusers with and without torch.compile and against
# the floors. A part that reaches its limit has written the rows of the cases it finished.
bench() { # bench NAME SUITE CASES
  part "$1" 240 $python -m benchmarks --suite="$2" --only="$3" --out="$out/$1.json" --operations=20
}
ours() { # ours NAME SECONDS CASES: without the peers, which compile for minutes
  part "$1" "$2" $python -m benchmarks --suite=gpu --only="$3" --out="$out/$1.json" --nopeers \
    --operations=60
}
bench transformer_06b gpu 'transformer_0.6b*'
bench transformer_16b gpu 'transformer_1.6b*'
bench decoder gpu 'dcae_decode*'
# About 60 s. Not yet run on a GPU: with fused multiply-adds in the depthwise kernels.
ours latency_06b_now 110 picture_0.6b_1step,sketch_0.6b_1step
ours latency_16b_now 110 picture_1.6b_1step
# It once had not compiled after 60 s. The decoder alone compiles in 38 s for an H200 on a busy
# core, before the search for the fastest products.
ours throughput_06b_now 240 picture_0.6b_1step_batch10
bench latency_06b gpu 'picture_0.6b_?step,picture_0.6b_?step_512'
# Plain attention, and one program instead of three.
bench latency_06b_ways gpu \
  'picture_0.6b_1step_plain,picture_0.6b_1step_at_once,sketch_0.6b_1step_at_once'
# The same with single launches instead of CUDA graphs, which were faster on an H200.
XLA_FLAGS=--xla_gpu_enable_command_buffer= \
  bench latency_06b_no_graphs gpu 'picture_0.6b_1step_at_once'
bench latency_16b gpu 'picture_1.6b_?step,picture_1.6b_?step_512'
bench throughput_06b gpu 'picture_0.6b_*_batch10,picture_0.6b_*_batch32'
bench throughput_16b gpu 'picture_1.6b_*_batch10,picture_1.6b_*_batch32'
bench sketch gpu 'sketch_?.?b_1step'
# Without the search among Triton's products the pair compiles in 88 s. With it, it once had not
# compiled after 220 s beside other jobs.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false bench training_600m gpu \
  'sprint_pair_600m_remat_block,sprint_pair_600m_remat_cheap'
# Not yet run on a GPU: with a float32 residual stream, as published and as in the cards (8 % more
# bytes by the compiled program), and with fused multiply-adds in the depthwise kernels.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false ours training_600m_now 240 \
  'sprint_pair_600m_remat_cheap_kernels,sprint_pair_600m_remat_cheap_kernels_bf16_residual'
# Without loops over blocks, whose stacks are a quarter of the bytes of all passes. Not yet run on a
# GPU; its compile time there is unknown.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false ours training_600m_unrolled 480 \
  sprint_pair_600m_remat_cheap_kernels_unrolled
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false bench training_1600m gpu \
  'sprint_pair_1600m_remat_block'
bench training_embedded gpu 'sprint_pair_embedded'
bench kernels_06b kernels '*_0.6b_*'
bench kernels_16b kernels '*_1.6b_*'
part depthwise 40 $python -m benchmarks.depthwise
# Not yet run on a GPU: other tiles and numbers of warps for every kernel.
part tiles 200 $python -m benchmarks.tiles
part pair_shapes_64 60 $python -m benchmarks.pair --preset=shapes_64
# Memory and time of the published sizes' training steps, 16 samples; docs/results/plan.md predicts
# them.
part pair_600m_block 120 $python -m benchmarks.pair --preset=sana_600m --batch=16 --remat=block
part pair_600m_cheap 120 $python -m benchmarks.pair --preset=sana_600m --batch=16 --remat=cheap
# The paper's ablations at 64 px, about an hour in all by arithmetic. Repeat this part with the same
# OUT until it reports that it wrote its report. docs/guide/own-data.md explains how to build
# data/emoji.
if [ -d data/emoji ]; then
  part ablate_small 540 $python -m experiments.ablations --suite=paper --scale=small \
    --workdir="$out/ablate_small"
fi
# The main job at 64 px, teacher included, with a network of 22 M parameters instead of the card's
# 5. Not yet run on a GPU.
part main_shapes_64 420 $python -m sprint_jax.main --config=configs/sprint.py:shapes_64 \
  --config.model.width=384 --config.model.depth=12 --config.model.heads=12 \
  --config.model.cross_heads=6 --config.model.unroll=1 --config.model.dtype=bfloat16 \
  --config.phases.sprint.objective.head_blocks="(2,5,8,11)" --workdir="$out/shapes_64"
cp "$out"/shapes_64/*.png "$out"/shapes_64/summary.json "$out" 2>/dev/null

echo
cat "$out/table.txt"
