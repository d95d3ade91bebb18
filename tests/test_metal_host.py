"""The host executor itself, on kernels small enough to see what each must do."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from metal_host import CompileError, Mode, RunError

ORDERS = ["forward", "reverse", 7]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MATRICES = "#include <metal_simdgroup_matrix>\n"


def run(
    source,
    *inputs,
    shape=None,
    dtype=mx.float32,
    threads=32,
    groups=1,
    header="",
    template=(),
    mode=Mode.PLAIN,
    **options,
):
    """Runs ``source`` with inputs ``a, b, c`` and one output ``o``, by default shaped like a."""
    kernel = metal_host.metal_kernel(
        name="small",
        input_names=list("abc"[: len(inputs)]),
        output_names=["o"],
        source=source,
        header=header,
    )
    return metal_host.run(
        kernel,
        inputs=[mx.array(array) for array in inputs],
        output_shapes=[inputs[0].shape if shape is None else shape],
        output_dtypes=[dtype],
        grid=(threads * groups, 1, 1),
        threadgroup=(threads, 1, 1),
        template=template,
        mode=mode,
        **options,
    )


def output(*arguments, **options):
    return np.array(run(*arguments, **options).outputs[0].astype(mx.float32))


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- the traced source


def test_traces_the_source_that_mlx_generates():
    kernel = mx.fast.metal_kernel(
        name="scaled",
        input_names=["large", "small", "number"],
        output_names=["o"],
        header="template <typename T, int N> T times(T x) { return x * T(N); }",
        source="uint i = thread_position_in_grid.x;\n"
        "o[i] = times<T, N>(large[i]) + small[large_shape[1] - 1] + number;",
    )

    def call(large, small, number):
        return kernel(
            inputs=[large, small, number],
            template=[("T", mx.bfloat16), ("N", 3)],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
            output_dtypes=[mx.bfloat16],
            verbose=True,
        )

    (traced,) = metal_host.trace(
        call, mx.zeros((16, 2), mx.bfloat16), mx.zeros((2,)), mx.array(1.0)
    )
    assert "o[i] = times<T, N>(large[i])" in traced.text
    assert traced.entry.endswith("<bfloat16_t, 3>")
    assert [buffer.declaration for buffer in traced.buffers] == [
        "const device bfloat16_t* large",
        "const constant int* large_shape",
        "const constant float* small",
        "const constant float& number",
        "device bfloat16_t* o",
    ]
    assert traced.attributes == (("uint3", "thread_position_in_grid"),)


def test_passes_shapes_strides_ranks_and_numbers():
    source = """
    o[0] = a_shape[0] * 100 + a_shape[1];
    o[1] = a_strides[0] * 100 + a_strides[1];
    o[2] = a_ndim;
    o[3] = b;
    """
    got = output(source, floats(4, 16), np.float32(2.5), shape=(4,), threads=1)
    assert got.tolist() == [416, 1601, 2, 2.5]


def test_threadgroups_at_the_edge_of_the_grid_are_smaller():
    kernel = metal_host.metal_kernel(
        name="edge",
        input_names=[],
        output_names=["o"],
        source="""
        uint3 at = thread_position_in_grid;
        o[at.y * 10 + at.x] =
            threads_per_threadgroup.x * 1000 + threadgroup_position_in_grid.x * 100 + simd_sum(1);
        """,
    )
    result = metal_host.run(
        kernel,
        inputs=[],
        output_shapes=[(3, 10)],
        output_dtypes=[mx.int32],
        grid=(10, 3, 1),
        threadgroup=(8, 2, 1),
    )
    assert result.counters.threadgroups == 4
    assert result.outputs[0].tolist() == [
        *[[8016] * 8 + [2104] * 2] * 2,
        [8008] * 8 + [2102] * 2,
    ]


def test_outputs_are_poison_or_the_initial_value_until_written():
    source = "if (a[0] < 0.0f) o[0] = 1.0f;"
    assert np.isnan(output(source, np.ones(4, np.float32))).all()
    assert output(source, np.ones(4, np.float32), shape=(0, 4)).shape == (0, 4)
    assert (output(source, np.ones(4, np.float32), init_value=3) == 3).all()


# ---------------------------------------------------------------- types and functions


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_floats_round_as_mlx_does(dtype):
    edges = [0, -0.0, 1e-8, 6e-8, 3e-5, 65504, 65519, 65520, 1e30, np.inf, -np.inf, np.nan]
    ties = 1 + np.arange(64) / 2**12
    x = np.float32([*edges, *ties, *floats(1000), *(floats(1000) * 1e-5)])
    source = "for (int i = 0; i < a_shape[0]; ++i) o[i] = T(a[i]);"
    got = output(source, x, dtype=dtype, template=[("T", dtype)], threads=1)
    np.testing.assert_array_equal(got, np.array(mx.array(x).astype(dtype).astype(mx.float32)))


SIMD_FUNCTIONS = {
    "simd_sum(x)": lambda x: np.full(32, x.sum()),
    "simd_min(x)": lambda x: np.full(32, x.min()),
    "simd_max(x)": lambda x: np.full(32, x.max()),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "simd_shuffle(x, (lane * 5) % 32)": lambda x: x[np.arange(32) * 5 % 32],
    "simd_shuffle_xor(x, 12)": lambda x: x[np.arange(32) ^ 12],
    "simd_shuffle_up(x, 3)": lambda x: np.concatenate([x[:3], x[:-3]]),
    "simd_shuffle_down(x, 3)": lambda x: np.concatenate([x[3:], x[-3:]]),
    "simd_broadcast(x, 9)": lambda x: np.full(32, x[9]),
    "float(simd_any(x > 2.0f))": lambda x: np.full(32, (x > 2).any()),
    "float(simd_all(x > -9.0f))": lambda x: np.full(32, (x > -9).all()),
}


def test_simd_functions():
    source = "uint lane = thread_index_in_simdgroup; const float x = a[lane];\n"
    for row, call in enumerate(SIMD_FUNCTIONS):
        source += f"o[{row} * 32 + lane] = {call};\n"
    x = floats(32)
    for got, (call, reference) in zip(
        output(source, x, shape=(len(SIMD_FUNCTIONS), 32)), SIMD_FUNCTIONS.items(), strict=True
    ):
        want = reference(x.astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=call)


def test_each_simdgroup_exchanges_its_own_values():
    x = floats(5, 2, 32)
    source = "uint i = thread_position_in_grid.x; o[i] = simd_sum(a[i]);"
    got = output(source, x, threads=64, groups=5)
    np.testing.assert_allclose(got, x.sum(2, keepdims=True) + 0 * x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.SPACES])
def test_vectors(mode):
    source = """
    const device float4* rows = (const device float4*)a;
    float4 sum = rows[0] * 2.0f + rows[1] * float4(1.0f, 2.0f, 3.0f, 4.0f);
    sum.y = 0.0f;
    if (thread_index_in_simdgroup == 0) ((device float4*)o)[0] = sum;
    """
    x = floats(2, 4)
    want = (2 * x[0] + x[1] * [1, 2, 3, 4]) * [1, 0, 1, 1]
    np.testing.assert_allclose(output(source, x, shape=(4,), mode=mode), want, rtol=1e-6)


@pytest.mark.parametrize(
    "expression",
    ["double(a[0])", "expm1(a[0])", "std::exp(a[0])", "a[0] * 0.1", "max(a[0], 1)"],
)
def test_what_metal_lacks_does_not_compile(expression):
    with pytest.raises(CompileError):
        run(f"o[0] = {expression};", floats(32))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("float fragment = a[0]; o[0] = fragment;", "fragment is a word of Metal's"),
        ("float matrix = a[0]; o[0] = matrix;", "matrix is a word of Metal's"),
        ("o[0] = a[0]; // \u2264 1", "not ASCII"),
    ],
)
def test_what_cpp_takes_and_metal_does_not_is_refused(source, reason):
    with pytest.raises(CompileError, match=reason):
        run(source, floats(32))


# ---------------------------------------------------------------- matrices


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.SPACES])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_matrix_products(dtype, mode):
    """``o = a[2:10, 1:9] @ b.T + 1``, by way of threadgroup memory."""
    source = """
    threadgroup T tile[64];
    simdgroup_matrix<T, 8, 8> left, right;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(left, a, 16, ulong2(1, 2));
    simdgroup_store(left, tile);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(left, tile);
    simdgroup_load(right, b, 8, ulong2(0), true);
    simdgroup_multiply_accumulate(sum, left, right, sum);
    simdgroup_store(sum, o);
    """
    a, b = mx.array(floats(16, 16)).astype(dtype), mx.array(floats(8, 8, seed=1)).astype(dtype)
    options = {"shape": (8, 8), "header": MATRICES, "template": [("T", dtype)], "mode": mode}
    result = run(source, a, b, **options)
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (a, b))
    want = a[2:10, 1:9] @ b.T + 1
    np.testing.assert_allclose(np.array(result.outputs[0]), want, rtol=1e-5, atol=1e-5)
    assert (result.counters.matrix_products, result.counters.matrix_flops) == (1, 1024)


def test_lanes_hold_the_elements_that_apple_gives_them():
    source = """
    simdgroup_matrix<float, 8, 8> square;
    square.thread_elements()[0] = thread_index_in_simdgroup;
    square.thread_elements()[1] = thread_index_in_simdgroup + 0.5f;
    simdgroup_store(square, o);
    simdgroup_store(simdgroup_matrix<float, 8, 8>(2.0f), o + 64);
    """
    lanes, diagonal = output(source, floats(1), shape=(2, 8, 8), header=MATRICES)
    first_row = np.array([0, 0.5, 1, 1.5, 8, 8.5, 9, 9.5])
    want = [first_row + offset for offset in (0, 2, 4, 6, 16, 18, 20, 22)]
    np.testing.assert_array_equal(lanes, want)
    np.testing.assert_array_equal(diagonal, 2 * np.eye(8))


# ---------------------------------------------------------------- threads


# Sums 128 numbers per threadgroup, halving the threads that add.
REDUCTION = """
threadgroup float partial[128];
uint i = thread_index_in_threadgroup;
partial[i] = a[thread_position_in_grid.x];
BARRIER
for (uint half_size = 64; half_size > 0; half_size /= 2) {
  if (i < half_size) {
    partial[i] += partial[i + half_size];
  }
  BARRIER
}
if (i == 0) {
  o[threadgroup_position_in_grid.x] = partial[0];
}
"""
MIRROR = """
threadgroup float tile[64];
uint i = thread_index_in_threadgroup;
tile[i] = a[i];
BARRIER
o[i] = tile[63 - i];
"""


@pytest.mark.parametrize("order", ORDERS)
def test_threadgroup_memory_is_shared(order):
    x = floats(3, 128)
    source = REDUCTION.replace("BARRIER", BARRIER)
    result = run(source, x, shape=(3,), threads=128, groups=3, order=order)
    np.testing.assert_allclose(np.array(result.outputs[0]), x.sum(1), rtol=1e-5, atol=1e-5)
    assert result.counters.threadgroups == 3
    assert result.counters.threadgroup_barriers == 3 * 8
    assert result.counters.threadgroup_bytes == 512


def test_threadgroup_numbers_are_shared_too():
    source = f"""
    threadgroup float last; // not: threadgroup float other;
    uint i = thread_index_in_threadgroup;
    if (i == 63) last = a[i];
    {BARRIER}
    o[i] = last;
    """
    x = floats(64)
    for mode in (Mode.PLAIN, Mode.SPACES):
        assert (output(source, x, threads=64, mode=mode) == x[63]).all()
    with pytest.raises(metal_host.TraceError, match="tile: not declared alone"):
        run("threadgroup float tile[4], other[4];", x)


def test_threadgroup_memory_is_poison_at_first():
    source = "threadgroup float tile[32]; o[thread_position_in_grid.x] = tile[0]; tile[0] = 1.0f;"
    assert np.isnan(output(source, floats(64), groups=2)[[0, 32]]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_gives_wrong_results_in_any_order(order):
    x = floats(64)
    right = MIRROR.replace("BARRIER", BARRIER)
    wrong = MIRROR.replace("BARRIER", "")
    np.testing.assert_array_equal(output(right, x, threads=64, order=order), x[::-1])
    assert np.isnan(output(wrong, x, threads=64, order=order)).any()


@pytest.mark.parametrize(
    "barrier",
    [
        "",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup_barrier(mem_flags::mem_none);",
        "simd_sum(tile[i]);",
    ],
)
def test_a_missing_barrier_is_a_race(barrier):
    with pytest.raises(RunError, match="data race"):
        run(MIRROR.replace("BARRIER", barrier), floats(64), threads=64, mode=Mode.THREAD)


def test_a_simdgroup_barrier_orders_a_simdgroup():
    x = floats(32)
    source = MIRROR.replace("63", "31")
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    got = output(source.replace("BARRIER", barrier), x, mode=Mode.THREAD)
    np.testing.assert_array_equal(got, x[::-1])
    with pytest.raises(RunError, match="data race"):
        run(source.replace("BARRIER", ""), x, mode=Mode.THREAD)


def test_two_threadgroups_that_write_one_place_are_a_race():
    source = BARRIER + "o[thread_index_in_threadgroup] = a[thread_position_in_grid.x];"
    with pytest.raises(RunError, match="data race"):
        run(source, floats(64), groups=2, mode=Mode.THREAD)


@pytest.mark.parametrize("threads", [254, 255])
def test_races_are_seen_in_as_many_threads_as_are_told_apart(threads):
    source = f"for (int i = 0; i < 3; ++i) {{ {BARRIER} o[i] = a[i]; }}"
    with pytest.raises(RunError if threads < 255 else metal_host.Unavailable, match="race|blind"):
        run(source, floats(64), threads=threads, mode=Mode.THREAD)


def test_barriers_prevent_races():
    x = floats(2, 128)
    source = REDUCTION.replace("BARRIER", BARRIER)
    got = output(source, x, shape=(2,), threads=128, groups=2, mode=Mode.THREAD)
    np.testing.assert_allclose(got, x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "source",
    [
        f"if (thread_index_in_threadgroup < 40) {BARRIER}",
        f"if (thread_index_in_threadgroup == 5) return;\n{BARRIER}",
        "if (thread_index_in_simdgroup < 16) o[0] = simd_sum(1.0f);",
        "if (thread_index_in_simdgroup < 16)\n o[0] = simd_sum(1.0f);\nelse o[1] = simd_sum(1.0f);",
    ],
)
def test_divergent_threads_are_reported(source):
    with pytest.raises(RunError, match="divergent threads: thread"):
        run(source, floats(64), threads=64)


def test_limits_of_a_threadgroup():
    source = "threadgroup float tile[SIZE]; tile[0] = 0.0f; o[0] = tile[0];"
    run(source.replace("SIZE", "8192"), floats(32))
    with pytest.raises(RunError, match="more than 32768 bytes of threadgroup memory"):
        run(source.replace("SIZE", "8193"), floats(32))
    with pytest.raises(RunError, match="1056 threads in a threadgroup, more than 256"):
        run("o[0] = 0.0f;", floats(32), threads=1056)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "source",
    [
        "o[0] = a[thread_position_in_grid.x + 1];",
        "o[thread_position_in_grid.x + 1] = 0.0f;",
        "threadgroup float tile[8]; tile[thread_index_in_simdgroup] = 0.0f;",
        "threadgroup float tile[8]; threadgroup float* p = tile; p[8] = 0.0f; o[0] = p[0];",
        "float row[8]; row[a_shape[0] / 4] = 1.0f; o[0] = row[a_shape[0] / 8];",
    ],
    ids=["device read", "device write", "threadgroup index", "threadgroup pointer", "thread"],
)
def test_out_of_bounds_is_caught(source):
    with pytest.raises(RunError, match="out of bounds|overflow"):
        run(source, floats(32), mode=Mode.ADDRESS)


def test_sanitizers_pass_what_is_right():
    x = floats(64)
    source = MIRROR.replace("BARRIER", BARRIER)
    for mode in (Mode.ADDRESS, Mode.THREAD):
        np.testing.assert_array_equal(output(source, x, threads=64, mode=mode), x[::-1])


def test_a_wrong_address_space_does_not_compile():
    header = "inline float first(const device float* x) { return x[0]; }"
    source = "threadgroup float tile[32]; tile[0] = a[0]; o[0] = first(SPACE);"
    run(source.replace("SPACE", "a"), floats(32), header=header, mode=Mode.SPACES)
    wrong = source.replace("SPACE", "tile")
    run(wrong, floats(32), header=header, mode=Mode.PLAIN)
    with pytest.raises(CompileError, match="no matching function for call to 'first'"):
        run(wrong, floats(32), header=header, mode=Mode.SPACES)


def test_threadgroup_memory_is_declared_in_the_kernel_only():
    header = "inline float shared(float x) {\n  threadgroup float tile[1];\n  return x;\n}"
    with pytest.raises(metal_host.TraceError, match="tile: threadgroup memory outside"):
        run("o[0] = shared(a[0]);", floats(32), header=header)


def test_traffic():
    """Two threadgroups; each thread reads its own number and the threadgroup's first."""
    source = "uint i = thread_position_in_grid.x; o[i] = T(a[i] + a[i / 32 * 32]);"
    options = {"groups": 2, "dtype": mx.bfloat16, "template": [("T", mx.bfloat16)]}
    counters = run(source, floats(64), mode=Mode.TRAFFIC, **options).counters
    assert counters.device_bytes_read == 2 * 64 * 4
    assert counters.device_bytes_read_once == 64 * 4
    assert counters.device_bytes_written == 64 * 2


@pytest.mark.parametrize(
    "copy",
    [
        "((device float4*)o)[i] = ((const device float4*)a)[i];",
        "for (int k = 0; k < 4; ++k) o[4 * i + k] = a[4 * i + k];",
        "float x[4]; for (int k = 0; k < 4; ++k) x[k] = a[4 * i + k];"
        "for (int k = 0; k < 4; ++k) o[4 * i + k] = x[3 - k];",
    ],
)
def test_traffic_of_blocks(copy):
    source = f"const uint i = thread_position_in_grid.x; {copy}"
    counters = run(source, floats(128), mode=Mode.TRAFFIC).counters
    assert counters.device_bytes_read == counters.device_bytes_written == 512


# ---------------------------------------------------------------- inside a larger function


def test_executing_runs_the_kernels_that_a_function_calls():
    def square(x):
        kernel = mx.fast.metal_kernel(
            name="square",
            input_names=["x"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = x[i] * x[i];",
        )
        return kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    differentiable = mx.custom_function(square)

    @differentiable.vjp
    def gradient(x, cotangent, _):
        return 2 * x * cotangent

    x = mx.array(floats(50))
    with metal_host.executing() as runs:
        assert mx.metal.is_available() and mx.default_device() == mx.gpu
        got = mx.grad(lambda x: differentiable(3 * x).sum())(x)
    np.testing.assert_allclose(np.array(got), 18 * np.array(x), rtol=1e-6)
    assert [result.kernel.name for result in runs] == ["square"]
