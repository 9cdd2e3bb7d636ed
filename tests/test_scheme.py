import pytest

from quantkit.errors import QuantKitError
from quantkit.scheme import GROUP_SIZES, PRESETS, Scheme, parse_scheme

GROUPED = ("w4a16", "w3a16", "w2a16", "w4a8")
GROUPED_LABELS = [
    f"{name}-{groups}{asym}"
    for name in GROUPED
    for groups in (*(f"g{size}" for size in GROUP_SIZES), "channel")
    for asym in ("", "-asym")
]
LABELS = [*(name for name in PRESETS if name not in GROUPED), *GROUPED_LABELS]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_parses_back_to_its_scheme(label):
    scheme = parse_scheme(label)
    assert scheme.label == label
    assert Scheme(**scheme.to_dict()) == scheme


def test_labels_are_unique():
    assert len({parse_scheme(label) for label in LABELS}) == len(LABELS)


@pytest.mark.parametrize("name", GROUPED)
def test_the_name_alone_means_symmetric_groups_of_128(name):
    assert parse_scheme(name).label == f"{name}-g128"
    assert parse_scheme(f"{name}-sym") == parse_scheme(f"{name}-g128-sym") == parse_scheme(name)


def test_every_scheme_has_an_op():
    ops = {name: scheme.op for name, scheme in PRESETS.items()}
    assert ops == {
        "w8a16": "w8a16",
        "w8a8": "w8a8",
        "w4a16": "w4a16",
        "w3a16": "wna16",
        "w2a16": "wna16",
        "w4a8": "w4a8",
        "fp8": "w8a8",
        "w8a8-static": "w8a8",
        "fp8-static": "w8a8",
        "fp8-block": "fp8_block",
        "fp8-w8a16": "w8a16",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w5a16", "unknown scheme 'w5a16'; known: w8a16, w8a8, w8a8-static, w4a16"),
        ("w8a16-g64", "unknown scheme 'w8a16-g64'"),
        ("", "unknown scheme ''"),
        ("w4a16-g", "unknown part 'g'; parts are g32, g64, g128, channel, sym, asym"),
        ("w4a16-64", "unknown part '64'"),
        ("w4a16-g48", "group_size 48 is not supported; schemes of 2 to 4 bits take 32, 64, 128 or 'channel'"),
    ],
)
def test_a_wrong_label_is_refused_with_what_is_known(text, message):
    with pytest.raises(QuantKitError) as error:
        parse_scheme(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="fp8", weight="fp8", group_size=64), "group_size 64 is not supported"),
        (dict(name="w8a16", weight="int8", symmetric=False), "only schemes of 2 to 4 bits can be asymmetric"),
    ],
)
def test_a_scheme_checks_itself(fields, message):
    with pytest.raises(QuantKitError, match=message):
        Scheme(**fields)
