"""Collectives, kernels and bytes of small HLO programs, which are counted by hand."""

import pytest

from bef_jax.planning import counts, hlo

PLAIN = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.9 (p: f32[8], /*index=1*/q: bf16[4,2]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
"""


def module(*lines, before=""):
    """Reads a program whose entry has these lines, and that has other computations before."""
    return hlo.read(before + PLAIN + "".join(f"  {line}\n" for line in lines) + "}\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%all-reduce.1 = f32[8]{0} all-reduce(%p), channel_id=1, to_apply=%add",
            {"all-reduce": {"count": 1, "bytes": 32}},
        ),
        (  # a TPU's layouts, and s4, a type of half a byte
            "%x = (f32[7,7]{1,0:T(8,128)S(1)}, bf16[4]{0:T(256)}, /*index=2*/s4[6]{0}, pred[]) "
            "all-reduce(%a, %b, %c, %d), to_apply=%add",
            {"all-reduce": {"count": 1, "bytes": 196 + 8 + 3 + 1}},
        ),
        (
            "%r = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add",
            {"reduce-scatter": {"count": 1, "bytes": 8}},
        ),
        (
            "%s = u8[3,5]{1,0} all-to-all(%q), dimensions={0}",
            {"all-to-all": {"count": 1, "bytes": 15}},
        ),
    ],
)
def test_each_kind_of_collective_counts_the_bytes_of_its_result(line, expected):
    assert counts.collectives(module(line)) == expected


@pytest.mark.parametrize(
    ("kind", "started", "operands", "size"),
    [
        ("all-reduce", "(f32[8], f32[2])", "%p, %q", 40),
        ("all-reduce", "((f32[8]), f32[8])", "%p", 32),  # as jax 0.11 writes it
        ("all-reduce", "((f32[8], f32[2]), (f32[8], f32[2]))", "%p, %q", 40),
        ("all-gather", "(f32[8], f32[64])", "%p", 256),
        ("all-gather", "((f32[8], f32[2]), (f32[64], f32[16]))", "%p, %q", 320),
        ("collective-permute", "(f32[8], f32[8], u32[], u32[])", "%p", 32),
        ("reduce-scatter", "((f32[64]), f32[8])", "%p", 32),
    ],
)
def test_an_asynchronous_collective_counts_once(kind, started, operands, size):
    # What it calls, if the text says it, is the same collective.
    wrapped = f"%wrapped (x: f32[8]) -> f32[8] {{\n  ROOT %y = f32[8] {kind}(%x)\n}}\n\n"
    program = module(
        f"%start = {started} {kind}-start({operands}), channel_id=2, calls=%wrapped",
        f"%done = f32[8]{{0}} {kind}-done(%start)",
        before=wrapped,
    )
    assert counts.collectives(program) == {kind: {"count": 1, "bytes": size}}
    assert counts.kernels(program) == 1


def test_collectives_in_a_loop_count_every_turn_and_names_do_not_count():
    body = """%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inner = f32[8]{0} fusion(%x), kind=kCustom, calls=%wrapped
}

%wrapped (x: f32[8]) -> f32[8] {
  ROOT %all-reduce.3 = f32[8]{0} all-reduce(%x), to_apply=%add
}

%unused (x: f32[8]) -> f32[8] {
  ROOT %all-reduce.4 = f32[8]{0} all-reduce(%x), to_apply=%add
}

"""
    lines = (
        '%w = (s32[], f32[8]) while(%t), condition=%add, body=%body, backend_config='
        '{"known_trip_count":{"n":"4"}}',
        "%v = (s32[], f32[8]) while(%t), condition=%add, body=%body",
        "%c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%wrapped, %add}",
        "%all-reduce.5 = f32[8]{0} copy(%p)",
        "%g = f32[] get-tuple-element(%all-reduce.5), index=0",
    )  # fmt: skip
    found = counts.collectives(module(*lines, before=body))
    assert found == {"all-reduce": {"count": 6, "bytes": 6 * 32}}


def test_a_program_of_one_device_has_no_collectives():
    assert counts.collectives(module("ROOT %y = f32[8]{0} copy(%p)")) == {}


# ---- bytes of main memory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # 32 bytes in and 16 out. The operations inside a fusion move nothing.
        (["%f = bf16[4,2]{1,0:T(8,128)(2,1)} fusion(%p, %p), kind=kLoop, calls=%add"], 32 + 16),
        (["%f = f32[64]{0:T(256)S(1)} fusion(%p), kind=kLoop, calls=%add"], 32),
        (
            [
                "%f = (f32[2]{0:S(1)}, f32[4]{0:T(256)}) fusion(%p), calls=%add",
                "%g = f32[2]{0:S(1)} get-tuple-element(%f), index=0",
                "%h = f32[4]{0} get-tuple-element(%f), index=1",
                "ROOT %r = f32[4]{0} add(%g, %h)",
            ],
            32 + 16 + 16 + 16,
        ),
        (  # one read of main memory; copy-done ends the same copy
            [
                "%s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%p)",
                "%d = f32[8]{0:S(1)} copy-done(%s)",
            ],
            32,
        ),
        (["%s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)"], 2 * 32),
        (  # a token has no bytes
            ["%t = token[] after-all()", "%o = token[] outfeed(%p, %t), outfeed_shape=f32[8]{0}"],
            32,
        ),
        (["%s = (f32[]{:S(1)}, f32[], u32[]{:S(2)}) copy-start(%p)"], 0),
        (  # two of the eight numbers
            ["%s = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2]}"],
            8,
        ),
    ],
)
def test_only_arrays_in_main_memory_count(lines, expected):
    assert counts.hbm_traffic(module(*lines)) == expected


@pytest.mark.parametrize(
    "reads",
    [
        ["ROOT %r = f32[] fusion(%f#2), kind=kInput, calls=%add"],  # as jax 0.11 writes it
        [
            "%g = f32[4]{0} get-tuple-element(%f), index=2",
            "ROOT %r = f32[] fusion(%g), kind=kInput, calls=%add",
        ],
    ],
)
def test_an_element_of_a_tuple_does_not_count_as_the_tuple(reads):
    line = "%f = (f32[64]{0}, /*index=1*/bf16[6]{0}, f32[4]{0}) fusion(%p), kind=kLoop, calls=%add"
    # 32 bytes in and 256 + 12 + 16 out; then 16 in and 4 out.
    assert counts.hbm_traffic(module(line, *reads)) == 32 + 284 + 16 + 4


def test_an_operand_that_is_given_twice_is_read_once():
    line = '%m = (f32[8,8]{1,0}, s8[99]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm"'
    assert counts.hbm_traffic(module(line)) == 32 + 256


# ---- parts of arrays ----------------------------------------------------------------------------

SELECT = """%rows (images: u8[1000,64], indices: s32[4]) -> u8[4,64] {
  %images = u8[1000,64]{1,0} parameter(0)
  %view = u8[1000,8,8]{2,1,0} bitcast(%images)
  %indices = s32[4]{0} parameter(1)
  %one = u8[4,8,8]{2,1,0} gather(%view, %indices), slice_sizes={1,8,8}
  ROOT %other = u8[4,64]{1,0} bitcast(%one)
}

%pair (data: f32[1000], again: f32[1000], i: s32[]) -> f32[2] {
  %data.1 = f32[1000]{0} parameter(0)
  %again = f32[1000]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %here = f32[2]{0} dynamic-slice(%data.1, %i.1), dynamic_slice_sizes={2}
  %there = f32[2]{0} slice(%again), slice={[0:2]}
  ROOT %sum.1 = f32[2]{0} add(%here, %there)
}

%mixed (data: f32[1000], i: s32[]) -> (f32[2], f32[]) {
  %data = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %few = f32[2]{0} dynamic-slice(%data, %i), dynamic_slice_sizes={2}
  %all = f32[] reduce(%data, %i), dimensions={0}, to_apply=%add
  ROOT %both = (f32[2]{0}, f32[]) tuple(%few, %all)
}

"""
# Names of parameters need not be in their order.
PUT = """%put (row: f32[8], i: s32[], stack: f32[5,8]) -> f32[5,8] {
  %row = f32[8]{0} parameter(1)
  %stack = f32[5,8]{1,0} parameter(0)
  %flat = f32[1,8]{1,0} bitcast(%row)
  %i = s32[] parameter(2)
  ROOT %r = f32[5,8]{1,0} dynamic-update-slice(%stack, %flat, %i, %i)
}

%product (stack: f32[5,8], row: f32[8]) -> (f32[5,8], s8[4096]) {
  %stack.1 = f32[5,8]{1,0} parameter(0)
  %row.1 = f32[8]{0} parameter(1)
  %m = (f32[1,8]{1,0}, s8[4096]{0}) custom-call(%row.1), custom_call_target="__cublas$gemm"
  %m0 = f32[1,8]{1,0} get-tuple-element(%m), index=0
  %u = f32[5,8]{1,0} dynamic-update-slice(%stack.1, %m0)
  %m1 = s8[4096]{0} get-tuple-element(%m), index=1
  ROOT %t = (f32[5,8]{1,0}, s8[4096]{0}) tuple(%u, %m1)
}

"""
ARRAYS = (
    "%images.0 = u8[1000,64]{1,0} parameter(2)",
    "%indices.0 = s32[4]{0} parameter(3)",
    "%data.0 = f32[1000]{0} parameter(4)",
    "%i.0 = s32[] parameter(5)",
    "%stack.0 = f32[5,8]{1,0} parameter(6)",
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Four rows in and out, and their numbers.
        ("%f = u8[4,64]{1,0} fusion(%images.0, %indices.0), calls=%rows", 256 + 16 + 256),
        ("%g = u8[4,64]{1,0} gather(%images.0, %indices.0), slice_sizes={1,64}", 256 + 16 + 256),
        ("%s = f32[3]{0} slice(%data.0), slice={[5:8]}", 12 + 12),
        ("%f = f32[2]{0} fusion(%data.0, %data.0, %i.0), calls=%pair", 2 * 8 + 4 + 8),
        # It is read as a whole, too.
        ("%f = (f32[2]{0}, f32[]) fusion(%data.0, %i.0), calls=%mixed", 4000 + 4 + 12),
        # One row in and out, and its number; the other four are not touched.
        ("%f = f32[5,8]{1,0} fusion(%stack.0, %p, %i.0), calls=%put", 32 + 4 + 32),
        ("%f = f32[5,8]{1,0} dynamic-update-slice(%stack.0, %p, %i.0, %i.0)", 32 + 4 + 32),
        (
            "%f = ((f32[5,8]{1,0}, f32[8]{0}, s32[]), f32[5,8]{1,0}, u32[]) "
            "fusion-start(%stack.0, %p, %i.0), calls=%put",
            32 + 4 + 32,
        ),
        # A TPU may hold the array, or the row, in on-chip memory.
        ("%f = f32[5,8]{1,0:S(1)} fusion(%stack.0, %p, %i.0), calls=%put", 32 + 4),
        # The room that a library works in is neither a result nor an operand.
        ("%f = (f32[5,8]{1,0}, s8[4096]{0}) fusion(%stack.0, %p), calls=%product", 32 + 32),
        (
            '%c = (f32[2]{0}, u8[4096]{0}) custom-call(%p), custom_call_target="__cudnn$conv"',
            32 + 8,
        ),
        # Here nothing says that the bytes are no result.
        ('%c = (f32[2]{0}, u8[40]{0}) custom-call(%p), custom_call_target="mine"', 32 + 8 + 40),
        ('%c = u8[40]{0} custom-call(%p), custom_call_target="__cudnn$conv"', 32 + 40),
    ],
)
def test_of_an_array_only_the_part_that_is_used_counts(line, expected):
    program = module(*ARRAYS, line, before=SELECT + PUT)
    assert counts.hbm_traffic(program) == expected
    assert counts.kernels(program) == 1


# ---- kernels, loops and branches ----------------------------------------------------------------

BODIES = """%body (a: f32[8]) -> f32[8] {
  %a.0 = f32[8]{0} parameter(0)
  %a.1 = f32[8]{0} bitcast(%a.0)
  ROOT %b = f32[8]{0} negate(%a.1)
}

%two (a: f32[8]) -> f32[] {
  %a.2 = f32[8]{0} parameter(0)
  %c = f32[8]{0} call(%a.2), to_apply=%body
  ROOT %d = f32[] reduce(%c, %c), to_apply=%add
}

%test (a: f32[8]) -> pred[] {
  %a.3 = f32[8]{0} parameter(0)
  ROOT %e = pred[] fusion(%a.3), calls=%add
}

"""
TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'


@pytest.mark.parametrize(
    ("line", "kernels", "moved"),
    [
        (f"%w = f32[8]{{0}} while(%p), condition=%test, body=%body, {TRIPS}", 3, 3 * 64),
        ("%w = f32[8]{0} while(%p), condition=%test, body=%body", 1, 64),
        # Both branches count, and none of the additions of the reduction.
        ("%c = f32[] conditional(%q, %p, %p), branch_computations={%body, %two}", 3, 2 * 64 + 36),
        ("%c = f32[] conditional(%q, %p), true_computation=%two", 2, 64 + 36),
        ("%c = ((f32[8]{0}), f32[8]{0}) async-start(%p), calls=%body", 1, 64),
        ("%f = (f32[8]{0}, f32[]) fusion(%p), kind=kInput, calls=%two", 1, 32 + 36),
        ("ROOT %t = (f32[8]{0}) tuple(%p)", 0, 0),
    ],
)
def test_loops_count_every_turn_and_branches_all(line, kernels, moved):
    program = module(line, before=BODIES)
    assert (counts.kernels(program), counts.hbm_traffic(program)) == (kernels, moved)


def test_a_loop_without_a_known_number_of_turns_is_told():
    loop = "%w = f32[8]{0} while(%p), condition=%test, body=%body"
    assert counts.turns_known(module(f"{loop}, {TRIPS}", before=BODIES))
    assert not counts.turns_known(
        module(f"{loop}, {TRIPS}", f"{loop[:2]}2{loop[2:]}", before=BODIES)
    )
    assert counts.turns_known(module("ROOT %y = f32[8]{0} copy(%p)"))
