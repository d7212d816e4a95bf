"""Collectives and memory traffic of small HLO programs, whose bytes are counted by hand."""

import pytest

from bef_jax.planning import hlo

PLAIN = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.9 (p: f32[8], /*index=1*/q: bf16[4,2]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
"""


def module(*lines):
    return PLAIN + "".join(f"  {line}\n" for line in lines) + "}\n"


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
    assert hlo.collectives(module(line)) == expected


@pytest.mark.parametrize(
    ("kind", "started", "size"),
    [
        ("all-reduce", "(f32[8], f32[2])", 40),
        ("all-gather", "(f32[8], f32[64])", 256),
        ("all-gather", "((f32[8], f32[2]), (f32[64], f32[16]))", 320),
        ("collective-permute", "(f32[8], f32[8], u32[], u32[])", 32),
        ("reduce-scatter", "((f32[64]), f32[8])", 32),
    ],
)
def test_an_asynchronous_collective_counts_once(kind, started, size):
    text = module(
        f"%start = {started} {kind}-start(%p), channel_id=2",
        f"%done = f32[8]{{0}} {kind}-done(%start)",
    )
    assert hlo.collectives(text) == {kind: {"count": 1, "bytes": size}}


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
    text = module(*lines).replace("%add (a", body + "%add (a", 1)
    assert hlo.collectives(text) == {"all-reduce": {"count": 6, "bytes": 6 * 32}}


def test_a_program_of_one_device_has_no_collectives():
    assert hlo.collectives(module("ROOT %y = f32[8]{0} copy(%p)")) == {}


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
    assert hlo.hbm_traffic(module(*lines)) == expected


def test_a_loop_moves_its_bytes_every_turn():
    loop = """%body (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} negate(%a)
}

"""
    line = (
        '%w = f32[8]{0} while(%p), condition=%c, body=%body, known={"known_trip_count":{"n":"3"}}'
    )
    assert hlo.hbm_traffic(loop + module(line)) == 3 * 64
