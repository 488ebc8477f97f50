"""Warp-level instructions, matrix fragments, memory forms and control flow of the simulator."""

import itertools

import numpy as np
import pytest
import torch
from ptxsim import errors
from ptxsim.harness import compile_cuda, nvcc, ptx_kernel, run

RNG = np.random.default_rng(5)
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing")


def words(*shape: int) -> np.ndarray:
    return RNG.integers(0, 1 << 32, shape, dtype=np.uint64).astype("u4")


def per_lane(
    body: str, *inputs: np.ndarray, outputs: int = 1, threads: int = 32, **kw
) -> np.ndarray:
    """Runs `body`: %i0.. hold the inputs of this thread, %o0.. become the result, all b32."""
    n = len(inputs)
    loads = [".reg .b64 %q;", f".reg .b32 %i<{n + 1}>; .reg .b32 %o<{outputs}>;"]
    for k in range(n):
        loads += [f"mad.wide.u32 %q, %t, 4, %p{k + 1};", f"ld.global.b32 %i{k}, [%q];"]
    stores = [f"mad.wide.u32 %q, %t, {4 * outputs}, %p0;"]
    stores += [f"st.global.b32 [%q+{4 * k}], %o{k};" for k in range(outputs)]
    out = np.zeros((threads, outputs), "u4")
    module = ptx_kernel("\n".join([*loads, body, *stores]), 1 + n, **kw)
    run(module, "k", 1, threads, out, *inputs)
    return out


# --- shuffles, votes -----------------------------------------------------------------------


def shuffle(mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple:
    out, valid = [], []
    for lane in range(32):
        bval, cval = int(b[lane]) & 31, int(c[lane]) & 31
        segment = int(c[lane]) >> 8 & 31
        top = (lane & segment) | (cval & ~segment)
        low = lane & segment
        j = {
            "up": lane - bval, "down": lane + bval, "bfly": lane ^ bval,
            "idx": low | (bval & ~segment),
        }[mode]  # fmt: skip
        p = j >= top if mode == "up" else j <= top
        out.append(a[j if p else lane])
        valid.append(p)
    return np.array(out), np.array(valid)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str) -> None:
    a, b = words(32), RNG.integers(0, 32, 32).astype("u4")
    for width in (32, 16, 8, 2):
        clamp = 0 if mode == "up" else 31
        c = np.full(32, (32 - width) << 8 | clamp, "u4")
        got = per_lane(
            f".reg .pred %v; shfl.sync.{mode}.b32 %o0|%v, %i0, %i1, %i2, -1;"
            "selp.u32 %o1, 1, 0, %v;",
            a, b, c, outputs=2,
        )  # fmt: skip
        want, valid = shuffle(mode, a, b, c)
        np.testing.assert_array_equal(got[:, 0], want)
        np.testing.assert_array_equal(got[:, 1], valid)
        got = per_lane(f"shfl.sync.{mode}.b32 %o0, %i0, 3, {int(c[0])}, 0xffffffff;", a)
        np.testing.assert_array_equal(got[:, 0], shuffle(mode, a, np.full(32, 3), c)[0])


def test_votes() -> None:
    a = RNG.integers(0, 2, 64).astype("u4")
    a[32:] = 1
    got = per_lane(
        """.reg .pred %x; .reg .pred %y; setp.ne.u32 %x, %i0, 0;
        vote.sync.ballot.b32 %o0, %x, -1;
        vote.sync.any.pred %y, %x, -1; selp.u32 %o1, 1, 0, %y;
        vote.sync.all.pred %y, %x, -1; selp.u32 %o2, 1, 0, %y;
        vote.sync.uni.pred %y, %x, -1; selp.u32 %o3, 1, 0, %y;
        vote.sync.ballot.b32 %o4, !%x, -1;""",
        a, outputs=5, threads=64,
    )  # fmt: skip
    for w in range(2):
        lanes = a[32 * w : 32 * w + 32]
        ballot = sum(int(v) << i for i, v in enumerate(lanes))
        want = [
            ballot,
            lanes.any(),
            lanes.all(),
            lanes.all() or not lanes.any(),
            ballot ^ 0xFFFFFFFF,
        ]
        assert (got[32 * w : 32 * w + 32] == np.array(want, "u4")).all()


def test_match_redux_elect() -> None:
    a = RNG.integers(0, 4, 32).astype("u4")
    got = per_lane(
        """.reg .pred %x;
        match.any.sync.b32 %o0, %i0, -1;
        match.all.sync.b32 %o1|%x, %i0, -1; selp.u32 %o2, 1, 0, %x;
        redux.sync.add.u32 %o3, %i0, -1; redux.sync.max.s32 %o4, %i0, -1;
        redux.sync.xor.b32 %o5, %i0, -1;
        elect.sync %o6|%x, -1; selp.u32 %o7, 1, 0, %x; activemask.b32 %o8;""",
        a, outputs=9,
    )  # fmt: skip
    same = [sum(int(b == v) << i for i, b in enumerate(a)) for v in a]
    np.testing.assert_array_equal(got[:, 0], same)
    assert (got[:, 1] == 0).all() and (got[:, 2] == 0).all()
    assert (got[:, 3] == a.sum()).all() and (got[:, 4] == a.max()).all()
    assert (got[:, 5] == np.bitwise_xor.reduce(a)).all()
    assert (got[:, 6] == 0).all() and got[0, 7] == 1 and not got[1:, 7].any()
    assert (got[:, 8] == 0xFFFFFFFF).all()


@needs_nvcc
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_divergent_groups_with_their_own_masks(seed: int | None) -> None:
    source = r"""
    __global__ void k(const int* x, int* y) {
      int lane = threadIdx.x & 31, v = x[threadIdx.x];
      int third = lane % 3;
      unsigned mask = __match_any_sync(0xffffffffu, third);
      if (third == 0) v = __reduce_add_sync(mask, v);
      else if (third == 1) v = __ballot_sync(mask, v & 1);
      else v = __shfl_sync(mask, v, 2);
      y[threadIdx.x] = v + (int)__popc(__activemask());
    }"""
    x = RNG.integers(0, 1000, 64).astype("i4")
    y = np.zeros(64, "i4")
    run(compile_cuda(source), "k", 1, 64, x, y, seed=seed)
    for w, lane in itertools.product(range(2), range(32)):
        lanes = x[32 * w : 32 * w + 32]
        mine = [i for i in range(32) if i % 3 == lane % 3]
        want = {
            0: sum(int(lanes[i]) for i in mine),
            1: sum((int(lanes[i]) & 1) << i for i in mine),
            2: int(lanes[2]),
        }[lane % 3]
        if seed is None:
            assert (int(y[32 * w + lane]) - 32) & 0xFFFFFFFF == want


# --- matrix fragments ----------------------------------------------------------------------
# The element (row, col) of fragment index i in a lane, as the PTX ISA lists them per shape.


def a16(lane: int, i: int, k: int) -> tuple[int, int]:
    group, pair = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, pair * 2 + (i & 1) + (8 if i >= 4 else 0)


def b16(lane: int, i: int, k: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def a_tf32(lane: int, i: int, k: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i % 2), lane % 4 + (4 if i >= 2 else 0)


def b_tf32(lane: int, i: int, k: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane >> 2


def a8(lane: int, i: int, k: int) -> tuple[int, int]:
    group = lane >> 2
    if k == 16:
        return group + (8 if i >= 4 else 0), (lane % 4) * 4 + (i & 3)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, (lane % 4) * 4 + (i & 3) + (16 if i >= 8 else 0)


def b8(lane: int, i: int, k: int) -> tuple[int, int]:
    return (lane % 4) * 4 + (i & 3) + (16 if i >= 4 else 0), lane >> 2


def c32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


MMA = {
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, a16, b16, "f4"),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, a16, b16, "f4"),
    "m16n8k8.row.col.f32.f16.f16.f32": (torch.float16, a16, b16, "f4"),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, a16, b16, "f4"),
    "m16n8k16.row.col.f16.f16.f16.f16": (torch.float16, a16, b16, "f2"),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, a_tf32, b_tf32, "f4"),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (torch.float32, a_tf32, b_tf32, "f4"),
    "m16n8k32.row.col.s32.s8.s8.s32": (torch.int8, a8, b8, "i4"),
    "m16n8k32.row.col.s32.u8.s8.s32": (torch.uint8, a8, b8, "i4"),
    "m16n8k16.row.col.s32.s8.s8.s32": (torch.int8, a8, b8, "i4"),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": (torch.float8_e4m3fn, a8, b8, "f4"),
    "m16n8k32.row.col.f32.e5m2.e4m3.f32": (torch.float8_e5m2, a8, b8, "f4"),
}


@pytest.mark.parametrize("shape", MMA)
def test_mma(shape: str) -> None:
    dtype, place_a, place_b, out = MMA[shape]
    k = int(shape.split("k")[1].split(".")[0])
    b_dtype = dtype
    if ".u8.s8" in shape:
        b_dtype = torch.int8
    if "e5m2.e4m3" in shape:
        b_dtype = torch.float8_e4m3fn

    def draw(rows: int, cols: int, t: torch.dtype) -> torch.Tensor:
        if t in (torch.int8, torch.uint8):
            info = torch.iinfo(t)
            return torch.from_numpy(RNG.integers(info.min, info.max + 1, (rows, cols))).to(t)
        x = torch.from_numpy(RNG.standard_normal((rows, cols)).astype("f4"))
        if t is torch.float32:  # on the tf32 grid
            return (x.view(torch.int32) & -8192).view(torch.float32)
        return x.to(t)

    a, b = draw(16, k, dtype), draw(k, 8, b_dtype)
    c = RNG.integers(-9, 9, (16, 8)).astype(out)

    def fragments(x: torch.Tensor, place, per_lane_count: int) -> np.ndarray:
        raw = x.contiguous().view(torch.uint8).numpy().reshape(*x.shape, -1)
        size = raw.shape[-1]
        lanes = np.zeros((32, per_lane_count, size), "u1")
        for lane, i in itertools.product(range(32), range(per_lane_count)):
            lanes[lane, i] = raw[place(lane, i, k)]
        return lanes.reshape(32, -1).view("u4")

    fa, fb = fragments(a, place_a, 16 * k // 32), fragments(b, place_b, 8 * k // 32)
    lanes = np.zeros((32, 4), out)
    for lane, i in itertools.product(range(32), range(4)):
        lanes[lane, i] = c[c32(lane, i)]
    fc = lanes.view("u4")
    na, nb, nc = fa.shape[1], fb.shape[1], fc.shape[1]
    regs = lambda first, n: "{" + ", ".join(f"%i{first + j}" for j in range(n)) + "}"  # noqa: E731
    d = "{" + ", ".join(f"%o{j}" for j in range(nc)) + "}"
    inputs = [np.ascontiguousarray(x) for x in (*fa.T, *fb.T, *fc.T)]
    got = per_lane(
        f"mma.sync.aligned.{shape} {d}, {regs(0, na)}, {regs(na, nb)}, {regs(na + nb, nc)};",
        *inputs, outputs=nc,
    )  # fmt: skip
    got = got.view(out)
    want = a.double().numpy() @ b.double().numpy() + c.astype("f8")
    for lane, i in itertools.product(range(32), range(4)):
        expected = want[c32(lane, i)]
        if out == "i4":
            assert got[lane, i] == expected
        else:
            np.testing.assert_allclose(got[lane, i], expected, rtol=2e-3 if out == "f2" else 1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_stmatrix(count: int, trans: bool) -> None:
    """Loads matrices whose rows lie in shuffled 16-byte slots; stmatrix brings them back."""
    tiles = RNG.integers(0, 1 << 16, (count, 8, 8)).astype("u2")
    slots = RNG.permutation(8 * count)
    memory = np.zeros((8 * count, 8), "u2")
    for m, r in itertools.product(range(count), range(8)):
        memory[slots[8 * m + r]] = tiles[m, r]
    address = np.zeros(32, "u4")
    address[: 8 * count] = slots * 16
    regs = ", ".join(f"%o{j}" for j in range(count))
    suffix = ".trans" if trans else ""
    body = f"""
    .reg .b32 %s; .reg .b32 %u; .reg .b64 %w; .reg .b32 %v<4>; .reg .pred %x;
    mov.u32 %s, smem; setp.lt.u32 %x, %t, {8 * count};
    mad.wide.u32 %w, %t, 16, %p2; mad.lo.u32 %u, %t, 16, %s;
    @%x ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%w];
    @%x st.shared.v4.b32 [%u], {{%v0, %v1, %v2, %v3}};
    bar.sync 0; add.u32 %s, %s, %i0;
    ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{regs}}}, [%s];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%s], {{{regs}}};
    bar.sync 0;
    @%x ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%u];
    @%x st.global.v4.b32 [%w], {{%v0, %v1, %v2, %v3}};
    """
    before = memory.copy()
    out = np.zeros((32, count), "u4")
    text = f""".reg .b64 %q; .reg .b32 %i<1>; .reg .b32 %o<{count}>;
    mad.wide.u32 %q, %t, 4, %p1; ld.global.b32 %i0, [%q];
    {body}
    mad.wide.u32 %q, %t, {4 * count}, %p0;
    """ + "\n".join(f"st.global.b32 [%q+{4 * j}], %o{j};" for j in range(count))
    run(ptx_kernel(text, 3, shared=512), "k", 1, 32, out, address, memory)
    got = out.view("u2").reshape(32, count, 2)
    for lane, m, i in itertools.product(range(32), range(count), range(2)):
        row, col = lane // 4, 2 * (lane % 4) + i
        assert got[lane, m, i] == (tiles[m, col, row] if trans else tiles[m, row, col])
    np.testing.assert_array_equal(memory, before)


def test_movmatrix() -> None:
    tile = RNG.integers(0, 1 << 16, (8, 8)).astype("u2")
    a = tile.reshape(32, 2).view("u4").ravel()
    got = per_lane("movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;", a)
    np.testing.assert_array_equal(got.view("u2").reshape(8, 8), tile.T)


# --- memory --------------------------------------------------------------------------------


def test_vector_and_narrow_accesses() -> None:
    x = RNG.integers(0, 256, 32 * 32).astype("u1")
    y = np.zeros_like(x)
    body = """
    .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<2>; .reg .b32 %s8;
    mad.wide.u32 %a0, %t, 32, %p0; mad.wide.u32 %a1, %t, 32, %p1;
    ld.global.nc.L1::no_allocate.L2::128B.v4.u8 {%h0, %h1, %h2, %h3}, [%a1];
    st.global.v4.u8 [%a0], {%h0, %h1, %h2, %h3};
    ld.global.v2.u16 {%h0, %h1}, [%a1+4]; st.global.v2.u16 [%a0+4], {%h0, %h1};
    ld.global.cg.v2.u64 {%d0, %d1}, [%a1+16]; st.global.cs.v2.u64 [%a0+16], {%d0, %d1};
    ld.global.s8 %s8, [%a1+8]; st.global.b32 [%a0+8], %s8;
    ld.volatile.global.u32 %r0, [%a1+12]; st.relaxed.gpu.global.u32 [%a0+12], %r0;
    """
    report = run(ptx_kernel(body, 2), "k", 1, 32, y, x)
    want = x.reshape(32, 32).copy()
    want[:, 8:12] = want[:, 8:9].view("i1").astype("i4").view("u1")
    np.testing.assert_array_equal(y.reshape(32, 32), want)
    # 32 threads, 32 bytes apart: one sector each; every access is a request of its own.
    assert report.lines[min(report.lines)].sectors == 32
    assert report.stored_bytes("arg0") == 32 * 32
    assert report.unique_bytes("arg1") == 32 * (4 + 4 + 16 + 1 + 4)


def test_sub_byte_offsets_of_buffers() -> None:
    """Buffers may start anywhere their elements are aligned."""
    raw = np.arange(100, dtype="u2")
    x, y = raw[3:67], np.zeros(65, "u2")[1:]
    body = """.reg .b16 %h; mad.wide.u32 %a0, %t, 2, %p0; mad.wide.u32 %a1, %t, 2, %p1;
    ld.global.u16 %h, [%a1]; st.global.u16 [%a0], %h;"""
    report = run(ptx_kernel(body, 2), "k", 1, 64, y, x)
    np.testing.assert_array_equal(x, y)
    assert report.unique_bytes("arg1") == 128


ATOMICS = {
    "add.u32": lambda old, v: old + v,
    "min.s32": lambda old, v: min(old, v),
    "max.u32": lambda old, v: max(old, v),
    "and.b32": lambda old, v: old & v,
    "or.b32": lambda old, v: old | v,
    "xor.b32": lambda old, v: old ^ v,
    "exch.b32": lambda old, v: v,
    "inc.u32": lambda old, v: 0 if old >= v else old + 1,
    "dec.u32": lambda old, v: v if old == 0 or old > v else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics_return_what_a_serial_order_gives(op: str, space: str) -> None:
    values = RNG.integers(0, 50, 64).astype("u4")
    where = RNG.integers(0, 3, 64).astype("u4")
    cells = np.array([7, 0, 40], "u4")
    old = np.zeros(64, "u4")
    shared = space == "shared"
    address = "cvt.u64.u32 %z, %s; add.u64 %z, %z, %y;" if shared else "add.u64 %z, %p0, %y;"
    body = f"""
    .reg .b64 %y; .reg .b64 %z; .reg .b32 %v; .reg .b32 %w; .reg .b32 %s; .reg .pred %x;
    .reg .b32 %c; mov.u32 %s, smem; setp.lt.u32 %x, %t, 3; mad.wide.u32 %z, %t, 4, %p0;
    @%x ld.global.u32 %c, [%z]; mad.lo.u32 %v, %t, 4, %s; @%x st.shared.u32 [%v], %c; bar.sync 0;
    mad.wide.u32 %a1, %t, 4, %p1; ld.global.u32 %v, [%a1];
    mad.wide.u32 %a2, %t, 4, %p2; ld.global.u32 %w, [%a2]; mul.wide.u32 %y, %w, 4;
    {address} atom.{space}.{op} %v, [%z], %v;
    mad.wide.u32 %a3, %t, 4, %p3; st.global.u32 [%a3], %v; bar.sync 0;
    mad.lo.u32 %v, %t, 4, %s; mad.wide.u32 %z, %t, 4, %p0;
    """ + ("@%x ld.shared.u32 %c, [%v]; @%x st.global.u32 [%z], %c;" if shared else "")
    want_cells, want_old = [int(c) for c in cells], []
    for v, w in zip(values.tolist(), where.tolist()):
        want_old.append(want_cells[w])
        want_cells[w] = ATOMICS[op](want_cells[w], v) & 0xFFFFFFFF
    run(ptx_kernel(body, 4, shared=64), "k", 1, 64, cells, values, where, old)
    np.testing.assert_array_equal(old, want_old)
    np.testing.assert_array_equal(cells, want_cells)


@needs_nvcc
@pytest.mark.parametrize("seed", [None, 4])
def test_float_atomics_cas_loops_and_locks(seed: int | None) -> None:
    source = r"""
    #include <cuda_fp16.h>
    #include <cuda_bf16.h>
    __global__ void k(float* f, __half2* h, __nv_bfloat162* b, unsigned long long* c, float* m,
                      int* lock, int* guarded) {
      int t = blockIdx.x * blockDim.x + threadIdx.x;
      atomicAdd(f + (t & 1), 1.0f);
      atomicAdd(h, __floats2half2_rn(1, 2));
      atomicAdd(b, __floats2bfloat162_rn(1, 2));
      atomicCAS(c, 5ull, 6ull);
      int old = __float_as_int(*(volatile float*)m), seen;   // the CAS maximum
      do {
        seen = old;
        old = atomicCAS((int*)m, seen, __float_as_int(fmaxf(__int_as_float(seen), t)));
      } while (old != seen);
      if (threadIdx.x % 32 == 0) {
        while (atomicCAS(lock, 0, 1) != 0) {}
        __threadfence();
        *(volatile int*)guarded = *(volatile int*)guarded + 1;
        __threadfence();
        atomicExch(lock, 0);
      }
    }"""
    f, h, b = np.zeros(2, "f4"), np.zeros(2, "f2"), np.zeros(2, "u2")
    c, m = np.array([5], "u8"), np.zeros(1, "f4")
    lock, guarded = np.zeros(1, "i4"), np.zeros(1, "i4")
    run(compile_cuda(source), "k", 2, 64, f, h, b, c, m, lock, guarded, seed=seed)
    assert f.tolist() == [64, 64] and h.tolist() == [128, 256]
    assert (b.astype("u4") << 16).view("f4").tolist() == [128, 256]
    assert c[0] == 6 and m[0] == 127 and guarded[0] == 4


@needs_nvcc
def test_vector_reduction_and_async_forms() -> None:
    body = """
    .reg .b32 %s; .reg .b32 %n; .reg .b32 %v<4>; .reg .f32 %f<4>; .reg .pred %x;
    mov.u32 %s, smem; mad.lo.u32 %s, %t, 16, %s; mad.wide.u32 %a1, %t, 16, %p1;
    and.b32 %n, %t, 3; shl.b32 %n, %n, 2;
    cp.async.ca.shared.global [%s], [%a1], 16, %n;
    cp.async.wait_all;
    mad.wide.u32 %a0, %t, 16, %p0;
    ld.shared.v4.f32 {%f0, %f1, %f2, %f3}, [%s];
    red.global.add.v4.f32 [%a0], {%f0, %f1, %f2, %f3};
    setp.lt.u32 %x, %t, 16;
    cp.async.cg.shared.global [%s], [%a1], 16, %x;
    cp.async.wait_all;
    ld.shared.v4.f32 {%f0, %f1, %f2, %f3}, [%s];
    red.global.add.v4.f32 [%a0], {%f0, %f1, %f2, %f3};
    """
    x = RNG.standard_normal((32, 4)).astype("f4")
    y = np.ones((32, 4), "f4")
    run(ptx_kernel(body, 2, shared=512), "k", 1, 32, y, x)
    kept = np.arange(4) < (np.arange(32) & 3)[:, None]
    want = (np.float32(1) + np.where(kept, x, 0)) + np.where(np.arange(32)[:, None] < 16, 0, x)
    np.testing.assert_array_equal(y, want)


# --- control flow, functions, symbols ------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("seed", [None, 9])
def test_control_flow(arch: str, seed: int | None) -> None:
    source = r"""
    #include <cstdio>
    struct Pair { double a; float b; };
    __constant__ int kTable[4] = {10, 20, 30, 40};
    __device__ float gBias = 0.5f;
    __device__ __noinline__ Pair twice(Pair p, int n) {
      for (int i = 0; i < n; i++) { p.a *= 2; p.b += i; }
      return p;
    }
    __device__ __noinline__ int collatz(int n) {
      int steps = 0;
      while (n != 1) { n = n % 2 ? 3 * n + 1 : n / 2; steps++; }
      return steps;
    }
    __global__ void k(const int* x, double* y, int n) {
      int t = blockIdx.x * blockDim.x + threadIdx.x;
      if (t >= n) return;
      int v = x[t];
      float local[8];
      for (int i = 0; i < 8; i++) local[(i * v) & 7] = i;
      switch (v % 9) {
        case 0: v += kTable[t & 3]; break;
        case 1: v *= 3; break;
        case 2: v -= 7; break;
        case 3: v ^= 0x55; break;
        case 4: v = collatz(v); break;
        case 5: v = -v; break;
        case 6: v <<= 2; break;
        case 7: break;
        default: v = 1;
      }
      Pair p = twice(Pair{double(v), 1.f}, t & 3);
      y[t] = p.a + p.b + gBias + local[t & 7] * 0;
      if (t == 3) printf("thread %d has %s %.2f %lld\n", t, "text", 1.5, 1ll << 40);
    }"""
    n = 300
    x = RNG.integers(1, 1000, n).astype("i4")
    x |= 1  # so that every slot of `local` is written
    y = np.zeros(n, "f8")
    report = run(compile_cuda(source, arch), "k", 3, 128, x, y, n, seed=seed)

    def collatz(v: int) -> int:
        steps = 0
        while v != 1:
            v, steps = (3 * v + 1 if v % 2 else v // 2), steps + 1
        return steps

    for t in range(n):
        v = int(x[t])
        v = [
            v + 10 * ((t & 3) + 1), v * 3, v - 7, v ^ 0x55, collatz(v), -v, v << 2, v, 1,
        ][v % 9]  # fmt: skip
        a, b = float(v), 1.0
        for i in range(t & 3):
            a, b = a * 2, b + i
        assert y[t] == a + b + 0.5
    assert report.printed == ["thread 3 has text 1.50 1099511627776\n"]


@needs_nvcc
def test_dynamic_shared_memory_and_generic_addresses() -> None:
    source = r"""
    extern __shared__ float dyn[];
    __device__ __noinline__ float read(const float* p, int i) { return p[i]; }
    __global__ void k(const float* x, float* y) {
      __shared__ float s[64];
      unsigned size;
      asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(size));
      s[threadIdx.x] = x[threadIdx.x];
      dyn[threadIdx.x] = 2 * x[threadIdx.x];
      __syncthreads();
      float l[2] = {1.f, 2.f};
      const float* p = threadIdx.x % 4 == 0 ? s : threadIdx.x % 4 == 1 ? dyn
                     : threadIdx.x % 4 == 2 ? x : l;
      y[threadIdx.x] = read(p, threadIdx.x % 4 == 3 ? 1 : 63 - threadIdx.x) + size;
    }"""
    x, y = np.arange(64, dtype="f4"), np.zeros(64, "f4")
    run(compile_cuda(source), "k", 1, 64, x, y, dynamic_smem=256)
    t = np.arange(64)
    r = 63.0 - t
    want = np.choose(t % 4, [r, 2 * r, r, np.full(64, 2.0)]) + 256
    np.testing.assert_array_equal(y, want)


@needs_nvcc
@pytest.mark.parametrize("seed", [None, 1])
def test_named_barriers_and_reductions(seed: int | None) -> None:
    source = r"""
    __global__ void k(int* y) {
      __shared__ int s[128];
      int t = threadIdx.x, half = t / 64;
      s[t] = t;
      asm volatile("bar.sync %0, 64;" ::"r"(half + 1) : "memory");
      int v = s[half * 64 + 63 - t % 64];
      int c = __syncthreads_count(t % 3 == 0);
      int a = __syncthreads_and(t < 127), o = __syncthreads_or(t == 5);
      y[t] = v + 1000 * c + 1000000 * a + 2000000 * o;
    }"""
    y = np.zeros(128, "i4")
    run(compile_cuda(source), "k", 1, 128, y, seed=seed)
    t = np.arange(128)
    np.testing.assert_array_equal(y, t // 64 * 64 + 63 - t % 64 + 43000 + 2000000)


@needs_nvcc
def test_counts_are_exact() -> None:
    source = r"""
    __global__ void k(const float* x, const float4* v, float* y, int stride) {
      __shared__ float s[1024];
      int t = threadIdx.x;
      s[t * stride] = x[t];
      __syncthreads();
      y[t] = s[t * stride] + v[t].x + v[t].w + x[0];
    }"""
    module = compile_cuda(source)
    memory = np.zeros(1024, "f4")
    start = -memory.ctypes.data % 128 // 4
    for stride, ways in ((1, 1), (2, 2), (3, 1), (8, 8), (32, 32)):
        x, v, y = memory[start : start + 32], np.zeros(256, "f4"), np.zeros(32, "f4")
        v = v[-v.ctypes.data % 128 // 4 :][:128]
        report = run(module, "k", 1, 32, x, v, y, stride)
        assert report.bank_conflicts == 2 * (ways - 1)
        assert report.loaded_bytes("arg0") == 2 * 128 and report.unique_bytes("arg0") == 128
        assert report.buffers["arg0"].load_sectors == 4 + 1
        assert report.unique_bytes("arg1") in (512, 256)  # float4, or its two used words
        assert report.stored_bytes("arg2") == 128
        assert report.by_class["barrier"] == 1 and report.barriers == 1
        assert "arg1" in report.table()
    # A misaligned start touches one sector more.
    x = memory[start + 1 : start + 33]
    report = run(module, "k", 1, 32, x, np.zeros(128, "f4"), np.zeros(32, "f4"), 1)
    assert report.buffers["arg0"].load_sectors == 5 + 1


def test_parser_oddities() -> None:
    """Scoped labels, sinks, .loc beside .local, vector brackets, comments with braces."""
    body = """
    .local .align 4 .b8 depot[16]; // } not a brace
    .loc 1 12 3
    .reg .b32 %x<4>; .reg .b64 %l; .reg .pred %q; .reg .pred %z;
    mov.u64 %l, depot; st.local.u32 [%l+4], %t; ld.local.u32 %x0, [%l+4];
    setp.lt.u32 %q, %x0, 2;
    { .reg .pred p; .reg .b32 a; setp.eq.u32 p, %t, 0; @p bra LAB;
      mov.u32 a, 5; add.u32 %x0, %x0, a;
      LAB: }
    { .reg .pred p; setp.eq.u32 p, %t, 1; @!p bra LAB; add.u32 %x0, %x0, 100;
      LAB: add.u32 %x0, %x0, 1; }
    setp.gt.u32 %z|_, %x0, 3; /* { */
    shfl.sync.idx.b32 _|%q, %x0, 0, 31, -1;
    mov.b64 %l, {%x0, %t}; mov.b64 {_, %x1}, %l;
    mad.wide.u32 %a0, %t, 4, %p0; add.u32 %x0, %x0, %x1; st.global.u32 [%a0], %x0;
    """
    y = np.zeros(32, "u4")
    run(ptx_kernel(body, 1), "k", 1, 32, y)
    t = np.arange(32)
    want = t + np.where(t == 0, 0, 5) + np.where(t == 1, 100, 0) + 1 + t
    np.testing.assert_array_equal(y, want)


def test_partial_warps_and_blocks() -> None:
    """Block sizes that are no multiple of 32, in three dimensions."""
    body = """
    .reg .b32 %x<8>; .reg .b32 %s;
    mov.u32 %x0, %tid.x; mov.u32 %x1, %tid.y; mov.u32 %x2, %ntid.x; mad.lo.u32 %x3, %x1, %x2, %x0;
    mov.u32 %x4, %ctaid.x; mad.lo.u32 %x5, %x4, 45, %x3;
    mov.u32 %s, smem; mad.lo.u32 %s, %x3, 4, %s; st.shared.u32 [%s], %x5; bar.sync 0;
    ld.shared.u32 %x6, [%s]; mad.wide.u32 %a0, %x5, 4, %p0; st.global.u32 [%a0], %x6;
    """
    y = np.zeros(135, "u4")
    run(ptx_kernel(body, 1, shared=256), "k", 3, (9, 5), y)
    np.testing.assert_array_equal(y, np.arange(135))


def test_more_ctas_than_one_wave(monkeypatch) -> None:
    from ptxsim import engine

    monkeypatch.setattr(engine, "WAVE_THREADS", 64)
    body = """.reg .b32 %c; mov.u32 %c, %ctaid.x; mad.lo.u32 %c, %c, 32, %t;
    mad.wide.u32 %a0, %c, 4, %p0; st.global.u32 [%a0], %c;"""
    y = np.zeros(32 * 7, "u4")
    run(ptx_kernel(body, 1), "k", 7, 32, y)
    np.testing.assert_array_equal(y, np.arange(32 * 7))


def test_lane_outside_its_own_mask() -> None:
    body = ".reg .b32 %x; .reg .pred %q; setp.lt.u32 %q, %t, 8; @%q bra L; exit; L:" + (
        "shfl.sync.idx.b32 %x, %t, 0, 31, 0xf;"
    )
    with pytest.raises(errors.BarrierError, match="member mask"):
        run(ptx_kernel(body, 1), "k", 1, 32, np.zeros(1, "u4"))
