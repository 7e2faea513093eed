"""The predictions of kernels/benchmarks/static.py: machine code is counted right, limits and bytes are right."""

import csv
import dataclasses
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
NAMES = ("sass", "gpus", "launches", "binaries", "static", "mamba_ssm_scan", "static_plot", "cases", "output")


@pytest.fixture(scope="module")
def modules():
    """The scripts by name, as one of them finds the others that lie beside it."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in NAMES}
        for name in NAMES:
            sys.modules.pop(name, None)


# ---- machine code ---------------------------------------------------------------------------------------------------

# A tile loop (0x30 to 0x130) around a state loop (0x80 to 0xe0) that loads in one of two ways.
SASS = """
		Function : _Z6kernelv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0010*/               @P6 EXIT ;
        /*0020*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0030*/              @!P4 BRA 0x60 ;
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R9, R9 ;
        /*0060*/                   FADD R4, R4, R8 ;
        /*0070*/                   UMOV UR4, URZ ;
        /*0080*/              @!P1 BRA P2, 0xb0 ;
        /*0090*/               @P0 LDG.E.64 R10, desc[UR4][R2.64+0x8] ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   LDG.E.128 R10, desc[UR4][R2.64] ;
        /*00c0*/                   MUFU.EX2 R6, R6 ;
        /*00d0*/                   SHFL.UP PT, R7, R6, 0x1, RZ ;
        /*00e0*/               @P3 BRA 0x80 ;
        /*00f0*/                   IMAD.WIDE R2, R2, 0x4, R4 ;
        /*0100*/                   STG.E desc[UR4][R2.64], R6 ;
        /*0110*/               @P5 BRA 0x130 ;
        /*0120*/                   FFMA R4, R4, R4, R4 ;
        /*0130*/               @P5 BRA 0x30 ;
        /*0140*/                   EXIT ;
        /*0150*/                   BRA 0x150;
		Function : second
        /*0000*/                   EXIT ;
"""


def test_functions_and_instructions(modules):
    found = modules["sass"].functions(SASS)
    assert list(found) == ["_Z6kernelv", "second"] and len(found["second"]) == 1
    code = {i.address: i for i in found["_Z6kernelv"]}
    assert len(code) == 22
    assert (code[0x10].guard, code[0x10].opcode) == ("P6", "EXIT")
    assert [code[at].bytes for at in (0x40, 0x90, 0x100, 0x50)] == [16, 8, 4, 0]
    assert [code[at].target for at in (0x30, 0x80, 0xA0, 0xE0, 0x10)] == [0x60, 0xB0, 0xC0, 0x80, None]
    assert [code[at].falls_through for at in (0x30, 0xA0, 0x10, 0x140)] == [True, False, True, False]
    kinds = {
        0x20: "integer",
        0x50: "mufu",
        0x60: "fma",
        0x70: "integer",
        0xD0: "shuffle",
        0xE0: "other",
        0x90: "load_store",
    }
    assert {at: code[at].kind for at in kinds} == kinds


def test_loops_are_nested(modules):
    sass = modules["sass"]
    every = sass.blocks(sass.functions(SASS)["_Z6kernelv"])
    assert 0x150 not in every, "cannot be reached"
    whole = sass.nest(every)
    (tile,) = whole.inner
    (state,) = tile.inner
    assert (tile.header, state.header, whole.depth()) == (0x30, 0x80, 3)
    assert state.body == {0x80, 0x90, 0xB0, 0xC0} and state.ends == {0xC0}
    assert [loop.header for loop in sass.hot_chain(whole, every)] == [0x30, 0x80]


def test_the_path_is_the_one_that_is_meant(modules):
    sass = modules["sass"]
    code = sass.functions(SASS)["_Z6kernelv"]

    def counted(*args):
        hot, total = sass.executed(code, (5, 3), *args)
        return [hot[key] for key in LOOP] + [total[key] for key in TILE] + [sum(total.values())]

    LOOP = ("load_store", "LDG"), ("mufu", "MUFU"), ("shuffle", "SHFL"), ("other", "BRA")
    TILE = ("load_store", "LDG"), ("mufu", "MUFU"), ("integer", "IMAD"), ("load_store", "STG"), ("fma", "FADD")
    # 3 instructions and EXIT, a tile of 9 with its option and without FFMA, a turn of 5 with the vector load
    assert counted() == [15, 15, 15, 30, 20, 20, 5, 5, 5, 4 + 5 * 9 + 15 * 5]
    # vectors of 8 bytes at most: the loop's other way is one branch longer; the tile has to go without its load
    assert counted(8) == [15, 15, 15, 45, 15, 15, 5, 5, 5, 4 + 5 * 7 + 15 * 6]
    # without the option, as asked for
    assert counted(16, sass.Expected(0, 0)) == [15, 15, 15, 30, 15, 15, 5, 5, 5, 4 + 5 * 7 + 15 * 5]
    with pytest.raises(ValueError, match="no path with 7 exponentials and 0 bytes loaded, only"):
        counted(16, sass.Expected(7, 0))
    # the states' loop as the only hot one: that of tiles is beside it
    totals = [sum(sass.executed(code, (5,), 16, None, turns)[1].values()) for turns in (1, 3)]
    assert totals == [4 + turns * 9 + 5 * 5 for turns in (1, 3)]


def test_a_load_under_the_predicate_of_a_branch_is_on_one_way_alone(modules):
    sass = modules["sass"]
    text = """Function : f
        /*0000*/ @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ @P0 BRA 0x40 ;
        /*0020*/ LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/ LDG.E.64 R6, desc[UR4][R2.64] ;
        /*0040*/ EXIT ;
    """
    for widest, length in ((16, 3), (8, 5)):
        _, total = sass.executed(sass.functions(text)["f"], (), widest)
        assert sum(total.values()) == length


# ---- limits of GPUs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, registers, threads, shared, warps",
    [
        (90, 32, 1024, 0, 64),  # 65536 / (32 * 32) = 64 warps
        (80, 80, 256, 0, 24),  # 65536 / 2560 = 25, in fours 24: three blocks
        (90, 168, 128, 0, 12),  # 65536 / 5376 = 12: three blocks
        (80, 32, 128, 50 * 1024, 12),  # 164 KiB / 51 KiB = 3 blocks
        (90, 32, 128, 50 * 1024, 16),  # 228 KiB / 51 KiB = 4 blocks
        (90, 16, 32, 0, 32),  # no more than 32 blocks
        (90, 255, 32, 0, 8),  # 255 registers are allocated as 256
    ],
)
def test_occupancy(modules, capability, registers, threads, shared, warps):
    assert modules["gpus"].occupancy(capability, registers, threads, shared) == warps / 64


def test_time_to_issue(modules):
    gpus = modules["gpus"]
    executed = Counter({("fma", "FFMA"): 60, ("integer", "IMAD"): 4, ("mufu", "MUFU"): 8, ("integer", "UIADD3"): 8})
    a100, h100 = gpus.GPUS
    # 109 blocks of 8 warps: one multiprocessor of 108 has two blocks, 16 warps with 80 instructions each
    clocks = {"issue": 16 * 80 / 4, "fma": 16 * 64 * 32 / 64, "mufu": 16 * 8 * 32 / 16}
    got = gpus.issue_seconds(a100, executed, 8, 109)
    assert got == pytest.approx({name: n / 1.41e9 for name, n in clocks.items()})
    got = gpus.issue_seconds(h100, executed, 8, 109)
    assert got["fma"] == pytest.approx(8 * 64 * 32 / 128 / 1.98e9)


@pytest.mark.parametrize("name, peak", [("A100", 19.5e12), ("H100", 67e12)])
def test_clocks_and_lanes_give_the_published_peak(modules, name, peak):
    gpu = next(g for g in modules["gpus"].GPUS if g.name == name)
    lanes = modules["gpus"].CAPABILITIES[gpu.capability].fma
    assert 2 * lanes * gpu.multiprocessors * gpu.clock == pytest.approx(peak, rel=2e-3)


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(modules):
    return list(modules["launches"].launches(132, torch.bfloat16))


def test_all_kernels_are_there(recorded):
    assert {(launch.implementation, launch.kernel) for launch in recorded} == {
        *(("cuda", name) for name in ("forward_kernel", "backward_kernel")),
        *(("triton", f"{scan}_{way}_kernel") for scan in ("selective_scan", "route_scan") for way in ("fwd", "bwd")),
        *(("triton", f"cross_{way}_kernel") for way in ("scan", "merge")),
        *(("triton", f"ssd_{part}_kernel") for part in ("step", "state", "out", "input_grad", "projection_grad")),
        *(("triton", f"causal_conv1d_{part}kernel") for part in ("", "grad_")),
        ("triton", "pixels_kernel"),
    }


def test_launches_and_bytes_of_the_scan(recorded):
    """VMamba-T's third stage: 128 samples, 4 routes of 384 channels, 196 tokens, 1 state."""
    mine = [x for x in recorded if x.operator == "selective_scan" and x.size == "VMamba-T B128 D1536 L196 N1 G4"]
    forward, backward = (next(x for x in mine if x.kernel == f"{way}_kernel") for way in ("forward", "backward"))
    tokens, maps, chunks = 128 * 196, 1536, 4
    # u, delta, out; B, C; states before every 64 tokens and after the last, and the last state; A, D, bias
    expected = 2 * tokens * (3 * maps + 2 * 4) + 4 * 128 * maps * (chunks + 1 + 1) + 4 * 3 * maps
    assert forward.bytes == expected
    # u, delta, dout, du, ddelta; B, C; their partial gradients of 12 blocks of 32 channels; states; dA, dD, dbias
    expected = 2 * tokens * (5 * maps + 2 * 4) + 4 * tokens * 12 * 2 * 4
    expected += 4 * 128 * maps * (chunks + 1 + 3) + 4 * 3 * maps
    assert backward.bytes == expected
    # 8 lanes of 8 tokens, 4 channels of a warp, 8 warps of a block
    assert (forward.grid, forward.warps, forward.trips) == (128 * 4 * 12, 8, (4, 1))
    assert (forward.widest, forward.shared) == (8, 8 * 4 * 4 * 2)
    assert (forward.channels, forward.states) == (tokens * maps, 1)


def test_launches_and_bytes_of_both_directions(recorded):
    """Vim-T: the least that its docstring states, and what the kernels leave for themselves and for torch."""
    mine = {x.kernel: x for x in recorded if x.size == "Vim-T B128 L197 D384 N16 R12"}
    tokens, D, F, N = 128 * 197, 384, 12 + 2 * 16, 16
    states, parameters = 4 * 5 * 128 * 2 * N * D, 4 * 2 * D * (12 + N + 2)
    forward, backward = (mine[f"route_scan_{way}_kernel"] for way in ("fwd", "bwd"))
    # both sequences and the sum; proj of both directions; the sum of the first one in float32
    assert forward.bytes == 2 * tokens * (3 * D + 2 * F) + 4 * tokens * D + states + parameters
    # dout, both sequences and their gradients; proj, and its gradient in float32 from each of 12 blocks of channels;
    # what is carried between tiles; gradients of the parameters of every sample
    own = 4 * 12 * tokens * 2 * F + states // 5 + 128 * parameters
    assert backward.bytes == 2 * tokens * (5 * D + 2 * F) + own + states + parameters
    # 12 blocks of channels of 4 warps: one program for both directions, backward one for each; 4 tiles of 64 tokens
    assert (forward.grid, forward.warps, forward.trips) == (128 * 12, 4, (2, 4, N))
    assert (backward.grid, backward.warps, backward.trips) == (128 * 12 * 2, 8, (1, 4, N))


def test_work_is_counted_by_routes_and_states(recorded):
    by_size = {(x.operator, x.size): (x.channels, x.states) for x in recorded}
    tokens = 128 * 28 * 28
    assert by_size["ss2d_scan", "VMamba-T B128 D384 28x28 N16 R12"] == (tokens * 4 * 384, 16)
    assert by_size["cross_scan", "VMamba-T B128 C384 28x28"] == (tokens * 4 * 384, 1)
    assert by_size["ssd_chunk_scan", "VSSD-T B128 L784 H4 P64 N64"] == (tokens * 4 * 64, 64)
    assert by_size["causal_conv1d", "Vim-T B128 D384 L197 K4"] == (128 * 384 * 197, 1)


def test_the_published_scan_moves_the_same_maps(modules, recorded):
    mine = [x for x in recorded if x.implementation == "cuda" and x.size == "VMamba-T B128 D768 L3136 N16 G4"]
    published = modules["mamba_ssm_scan"].published
    forward, backward = (
        published(next(x for x in mine if x.kernel == f"{way}_kernel")) for way in ("forward", "backward")
    )
    tokens, maps = 128 * 3136, 768
    own = 2 * tokens * (3 * maps + 2 * 4 * 16) + 4 * maps * (16 + 2)
    assert forward.bytes == own + 4 * 128 * maps * 2 * 2 * 16  # and two chunks of 2048 tokens, two numbers per state
    assert (forward.grid, forward.warps, forward.trips) == (128 * maps, 4, (2, 16))
    own = 2 * tokens * (5 * maps + 2 * 4 * 16) + 2 * 4 * maps * (16 + 2)
    assert backward.bytes == own + 4 * tokens * 2 * 4 * 16 + 4 * 128 * maps * 2 * 2 * 16


# ---- what the README says of the table ------------------------------------------------------------------------------


def test_the_readme_prints_the_table():
    """Ranges over all sizes of the published scan's predicted time over ours, and ours on H100 with one state."""
    with open(FOLDER / "results" / "static" / "static.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["operator"] == "selective_scan" and row["gpu"]]
    times: dict[tuple, float] = {}
    for row in rows:
        way = "forward" if re.search("forward|fwd", row["kernel"]) else "backward"
        key = row["implementation"], way, row["gpu"], re.search(r" (N\d+) ", row["size"])[1], row["size"]
        times[key] = times.get(key, 0.0) + float(row["predicted_us"])
    readme = (FOLDER.parent / "README.md").read_text()
    for implementation in ("cuda", "triton"):
        for way in ("forward", "backward"):
            ranges = []
            for gpu, states in (("A100", "N1"), ("A100", "N16"), ("H100", "N1"), ("H100", "N16")):
                mine = [key for key in times if key[:4] == (implementation, way, gpu, states)]
                ratios = [times[("mamba_ssm", *key[1:])] / times[key] for key in mine]
                assert len(mine) == (4 if states == "N1" else 5)
                ranges.append(f"{min(ratios):.1f}-{max(ratios):.1f}")
            assert f"| {implementation}, {way} | {' | '.join(ranges)} |\n" in readme
    now = {way: [f"{us:.0f}" for key, us in times.items() if key[:4] == ("cuda", way, "H100", "N1")] for way in WAYS}
    said = f"to {', '.join(now['forward'])} predicted microseconds forward and from"
    assert said in " ".join(readme.split()) and f"to {', '.join(now['backward'])} backward." in " ".join(readme.split())


WAYS = ("forward", "backward")


# ---- the compilers --------------------------------------------------------------------------------------------------


def compiled(modules, launch, capability):
    binaries = modules["binaries"]
    try:
        for name in ("cuobjdump", *(["nvcc"] if launch.implementation == "cuda" else [])):
            binaries.tool(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    return modules["static"].row(
        launch, binaries.compile_launch(launch, capability), capability, modules["gpus"].GPUS[1]
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "implementation, kernel", [("cuda", "forward_kernel"), ("triton", "selective_scan_fwd_kernel")]
)
def test_prediction_of_a_compiled_kernel(modules, recorded, implementation, kernel):
    """One exponential per token, channel and state, but for tiles that are not full; a row of the table adds up."""
    size = "VMamba-T B128 D768 L3136 N16 G4"
    launch = next(x for x in recorded if (x.implementation, x.kernel, x.size) == (implementation, kernel, size))
    row = compiled(modules, launch, 90)
    tile = 64 if implementation == "cuda" else 128
    assert float(row["predicted_hot_mufu"]) == pytest.approx(-(-3136 // tile) * tile / 3136, rel=1e-2)
    parts = sum(float(row[f"predicted_hot_{name}"]) for name in modules["sass"].CLASSES)
    assert float(row["predicted_hot_instructions"]) == pytest.approx(parts, rel=1e-2)
    assert float(row["predicted_instructions"]) > parts > 10
    # 2 multiply-adds and 2 multiplications at least, one way or the other
    assert float(row["predicted_hot_fma"]) >= 4
    bounds = [float(row[f"predicted_{name}_us"]) for name in ("issue", "pipeline", "memory")]
    assert float(row["predicted_us"]) == max(bounds)
    assert bounds[2] == pytest.approx(launch.bytes / 3.35e12 * 1e6, rel=1e-3)


@pytest.mark.full
def test_wide_loads_are_counted_only_where_rows_are_aligned(modules, recorded):
    """The same kernel executes more where 49 tokens forbid vectors."""
    mine = {x.size: x for x in recorded if x.implementation == "cuda" and x.kernel == "forward_kernel"}
    launch = mine["VMamba-T B128 D3072 L49 N1 G4"]
    scalar = compiled(modules, launch, 90)
    vector = compiled(modules, dataclasses.replace(launch, widest=16), 90)
    assert float(scalar["predicted_hot_load_store"]) > 2 * float(vector["predicted_hot_load_store"])


def test_a_missing_source_of_mamba_ssm_is_named(modules, recorded, tmp_path):
    scan = modules["mamba_ssm_scan"]
    launch = scan.published(next(x for x in recorded if x.implementation == "cuda"))
    with pytest.raises(FileNotFoundError, match="--mamba-ssm takes the unpacked source"):
        scan.compile_published(launch, tmp_path, 90)
