"""The choice of formats: greedy by divergence saved per byte, within bounds, and read back as written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engines.errors import InputError, UsageError
from star_export.choice import (
    Budget,
    Formats,
    LayerFormats,
    check_budget,
    choose,
    formats_from_json,
    json_from_formats,
    upgrades,
)
from star_export.validator.formats_report import frontier, html_from_formats, svg_from_formats


def layer(name: str, *, small: int, large: int, kl4: float, kl8: float) -> LayerFormats:
    return LayerFormats(name, {"int4": small, "int8": large}, {"int4": kl4, "int8": kl8})


LAYERS = (
    layer("base_ar.layers.0", small=10, large=20, kl4=0.5, kl8=0.1),  # 0.04 per byte
    layer("base_ar.layers.1", small=10, large=12, kl4=0.3, kl8=0.2),  # 0.05 per byte
    layer("base_ar.layers.2", small=10, large=40, kl4=0.9, kl8=0.0),  # 0.03 per byte
    layer("stacked_ar.layers.0", small=10, large=11, kl4=0.1, kl8=0.2),  # int8 does harm
    layer("stacked_ar.layers.1", small=10, large=15, kl4=0.2, kl8=0.1),  # 0.02 per byte
)


def wide(budget_bytes: int) -> list[str]:
    return [found.layer for found in choose(LAYERS, budget_bytes) if found.chosen == "int8"]


def test_layers_that_save_most_per_byte_come_first_and_those_that_int8_harms_never() -> None:
    order = [found.layer for found in upgrades(LAYERS)]
    assert order == ["base_ar.layers.1", "base_ar.layers.0", "base_ar.layers.2", "stacked_ar.layers.1"]


@pytest.mark.parametrize(
    "budget,expected",
    [
        (50, []),
        (51, []),
        (52, ["base_ar.layers.1"]),
        (62, ["base_ar.layers.0", "base_ar.layers.1"]),
        # The next one would take 30 bytes more, so it is passed over, and the one after it fits.
        (67, ["base_ar.layers.0", "base_ar.layers.1", "stacked_ar.layers.1"]),
        (92, ["base_ar.layers.0", "base_ar.layers.1", "base_ar.layers.2"]),
        (1000, ["base_ar.layers.0", "base_ar.layers.1", "base_ar.layers.2", "stacked_ar.layers.1"]),
    ],
)
def test_the_choice_keeps_within_the_budget(budget: int, expected: list[str]) -> None:
    assert wide(budget) == expected
    assert sum(found.bytes[found.chosen] for found in choose(LAYERS, budget)) <= budget


def test_equal_layers_are_chosen_in_their_order() -> None:
    equal = [layer(f"base_ar.layers.{i}", small=10, large=20, kl4=0.2, kl8=0.1) for i in range(3)]
    assert [found.chosen for found in choose(equal, 50)] == ["int8", "int8", "int4"]


@pytest.mark.parametrize(
    "budget,said",
    [
        (Budget(99, bits=3.96), ("below the smallest", "99 bytes (3.960 bits", "--bits from 4.000 to 8.000")),
        (Budget(201, bits=8.04), ("above the largest", "201 bytes (8.040 bits", "--bits from 4.000")),
        (Budget(99, target="t", memory_bytes=1, share=0.9), ("below the smallest", "target t", "--memory")),
        (Budget(-7, target="t", memory_bytes=1, share=0.9), ("below", "7 bytes too few", "more memory")),
        (Budget(201, target="t", memory_bytes=1, share=0.9), ("above", "target t", "--precision int8")),
    ],
)
def test_a_budget_outside_of_the_bounds_is_refused_with_numbers(
    budget: Budget, said: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        check_budget(budget, smallest_bytes=100, largest_bytes=200, weights=200)
    text = f"{error.value.what} {error.value.where} {error.value.fix}"
    assert all(words in text for words in said), text


@pytest.mark.parametrize("size", [100, 150, 200])
def test_the_bounds_themselves_are_budgets(size: int) -> None:
    check_budget(Budget(size, bits=1.0), smallest_bytes=100, largest_bytes=200, weights=200)


def formats(budget: int) -> Formats:
    return Formats(Budget(budget, bits=6.0), 100, 2, 16, "0" * 64, choose(LAYERS, budget))


def test_the_file_is_read_back_as_it_was_written_and_strictly() -> None:
    found = formats(62)
    text = json_from_formats(found)
    assert formats_from_json(text, where="formats.json") == found
    assert (found.bytes, found.bits) == (62, pytest.approx(4.96))
    damaged = json.loads(text)
    del damaged["layers"][0]["kl"]
    with pytest.raises(InputError, match=r"layers\[0\]: kl"):
        formats_from_json(json.dumps(damaged), where="formats.json")


def test_the_plot_goes_from_int4_everywhere_to_int8_where_it_helps() -> None:
    points = frontier(formats(62))
    assert [size for _, size, _ in points] == [50, 52, 62, 92, 97]
    assert [kl for _, _, kl in points] == pytest.approx([2.0, 1.9, 1.5, 0.6, 0.5])
    svg = svg_from_formats(formats(62))
    assert svg.count("<circle") == 5
    assert svg.count('class="c0 f0"') == 2, "the layers that were chosen are filled"


def test_the_table_has_a_row_for_every_layer_and_text_is_escaped() -> None:
    found = formats(62)
    page = html_from_formats(found)
    assert page.count("<tr><td>") == len(LAYERS)
    assert "62 bytes, 4.960 bits per weight; 2 of 5 are in int8" in page
    planted = replace(found, layers=(replace(LAYERS[0], layer="<b>"), *LAYERS[1:]))
    assert "<b>" not in html_from_formats(planted)
