"""Prices: what the room holds, and what no table of prices may hold."""

import pytest

from anypool.chips import PriceError, chips, load_prices, parse_prices, prices_of

HEADER = "provider,region,sku,chip,chips_per_sku,usd_per_hour,kind,term,source,date,grade,note\n"
EXTRA = HEADER.replace("note", "note,memory_gib,bf16_tflops")
ROW = "coreweave,,HGX H100,h100,8,49.24,on_demand,,coreweave.com/pricing,2026-09-20,S,\n"


def test_the_rooms_prices_pass_their_own_checks():
    prices = load_prices()
    assert len(prices) > 60
    for price in prices:
        assert 0 < price.usd_per_chip_hour < 20
        assert price.date >= "2026-01-01"


@pytest.mark.parametrize(
    ("chip", "provider", "region", "kind", "usd_per_chip_hour"),
    [
        ("v4", "google", "us-central2", "on_demand", 3.22),
        ("v5e", "google", "us-central1", "on_demand", 1.20),
        ("v5p", "google", "us-central1", "on_demand", 4.20),
        ("v5p", "google", "us-east5", "spot", 1.68),
        ("v6e", "google", "us-east5", "on_demand", 2.70),
        ("h100", "aws", "", "on_demand", 6.88),
        ("h200", "aws", "us-east", "on_demand", 7.912),
        ("gb200", "coreweave", "north-america", "on_demand", 10.50),
        ("b200", "coreweave", "", "on_demand", 8.60),
        ("trn1", "aws", "", "on_demand", 1.34375),
    ],
)
def test_prices_of_one_chip(chip, provider, region, kind, usd_per_chip_hour):
    found = [
        price.usd_per_chip_hour
        for price in prices_of(chip)
        if (price.provider, price.region, price.kind) == (provider, region, kind)
    ]
    assert any(price == pytest.approx(usd_per_chip_hour, rel=2e-3) for price in found)


def test_chips_without_a_price():
    without = "cpu tpu7x trn3 gb300 mi350x mi355x ascend-910b ascend-910c ascend-950pr ascend-950dt"
    assert {chip.name for chip in chips() if not prices_of(chip.name)} == set(without.split())


def test_cheapest_first():
    prices = [price.usd_per_chip_hour for price in prices_of("trillium")]
    assert prices == sorted(prices)


def row(**changes):
    cells = dict(zip(HEADER.strip().split(","), ROW.strip("\n").split(","), strict=True)) | changes
    return ",".join(cells[column] for column in HEADER.strip().split(",")) + "\n"


MISTAKES = {
    "SkyPilot's sentinel": (
        {"usd_per_hour": "700.0"},
        "t.csv:2: usd_per_hour = '700.0': stands for a missing price: leave the row out",
    ),
    "free": ({"usd_per_hour": "0.0"}, "t.csv:2: usd_per_hour = '0.0': stands for a missing price: leave the row out"),
    "blank": (
        {"usd_per_hour": ""},
        "t.csv:2: usd_per_hour = '': must be a number of USD; leave the row out if the price is not known",
    ),
    "not a number": ({"usd_per_hour": "nan"}, "t.csv:2: usd_per_hour = 'nan': must be a number of USD"),
    "undated": (
        {"date": ""},
        "t.csv:2: date = '': must be the day the source was read, such as 2026-11-23",
    ),
    "a month": ({"date": "2026-11"}, "t.csv:2: date = '2026-11': must be the day the source was read"),
    "long ago": ({"date": "1970-01-01"}, "t.csv:2: date = '1970-01-01': is before any of these chips was sold"),
    "no source": ({"source": " "}, "t.csv:2: source = '': must say where the number is from"),
    "a source that makes numbers up": (
        {"source": "deploybase.ai/h100"},
        "t.csv:2: source = 'deploybase.ai/h100': contradicts the vendors' documents",
    ),
    "no grade": ({"grade": "U"}, "t.csv:2: grade = 'U': must be one of P, V, S, D; a price of no grade is left out"),
    "kind": ({"kind": "ondemand"}, "t.csv:2: kind = 'ondemand': must be one of on_demand, spot, reserved, committed"),
    "term of an hourly price": ({"term": "3y"}, "t.csv:2: term = '3y': goes with reserved and committed prices"),
    "commitment without a term": ({"kind": "committed"}, "t.csv:2: term = '': goes with reserved and committed prices"),
    "unknown chip": ({"chip": "h10"}, "t.csv:2: chip = 'h10': there is no chip 'h10'; did you mean 'h100'?"),
    "alias": ({"chip": "h100-sxm"}, "t.csv:2: chip = 'h100-sxm': write the chip's own name, 'h100'"),
    "cores for chips": (
        {"sku": "v5p-8", "chip": "v5p"},
        "t.csv:2: chips_per_sku = '8': v5p-8 counts TensorCores, 2 a chip: write 4",
    ),
    "cores for chips of a v4": (
        {"sku": "tpu-v4-16", "chip": "v4", "chips_per_sku": "16"},
        "t.csv:2: chips_per_sku = '16': tpu-v4-16 counts TensorCores, 2 a chip: write 8",
    ),
    "chips for cores": (
        {"sku": "v6e-8", "chip": "v6e", "chips_per_sku": "4"},
        "t.csv:2: chips_per_sku = '4': v6e-8 counts chips: write 8",
    ),
    "half a chip": ({"chips_per_sku": "0.5"}, "t.csv:2: chips_per_sku = '0.5': must be a whole number of chips"),
    "price of an instance for a chip": (
        {"usd_per_hour": "98.32", "chips_per_sku": "1"},
        (
            "t.csv:2: usd_per_hour = '98.32': is 98.32 USD a chip and hour, not within 0.05 and 50: correct it or "
            "chips_per_sku"
        ),
    ),
    "price of a chip for an instance": (
        {"usd_per_hour": "0.3"},
        "t.csv:2: usd_per_hour = '0.3': is 0.0375 USD a chip and hour, not within 0.05 and 50",
    ),
    "no provider": ({"provider": ""}, "t.csv:2: provider = '': must not be empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(PriceError) as caught:
        parse_prices(HEADER + row(**changes), "t.csv")
    assert str(caught.value).startswith(message)


def test_mistakes_of_the_whole_table():
    with pytest.raises(PriceError, match=r"t\.csv:1: unknown column 'price'; known here: provider, "):
        parse_prices(HEADER.replace("usd_per_hour", "price") + ROW, "t.csv")
    with pytest.raises(PriceError, match=r"t\.csv:1: there is no column 'date': add it"):
        parse_prices(HEADER.replace("date,", ""), "t.csv")
    with pytest.raises(PriceError, match=r"t\.csv:2: has another number of fields than the header"):
        parse_prices(HEADER + ROW.replace("HGX H100", "HGX, H100"), "t.csv")


def test_two_prices_of_one_product_on_one_day():
    both = row(provider="aws", sku="p5.48xlarge", usd_per_hour="98.32")
    both += row(provider="aws", sku="p5.48xlarge", usd_per_hour="55.04")
    with pytest.raises(PriceError) as caught:
        parse_prices(HEADER + both, "t.csv")
    assert str(caught.value) == (
        "t.csv:3: usd_per_hour = 55.04: line 2 has 98.32 for p5.48xlarge of aws on 2026-09-20 too: keep the one that "
        "holds, or correct the date"
    )


def test_a_price_may_change_from_day_to_day():
    rows = row(usd_per_hour="26.3", date="2026-08-19") + row(usd_per_hour="31.9", date="2026-10-19")
    assert len(parse_prices(HEADER + rows, "t.csv")) == 2


def test_a_region_with_the_price_of_another_product():
    # As SkyPilot's catalogue had it: 33.61 in one region where the H100 costs 87.8 elsewhere.
    rows = "".join(
        row(provider="google", sku="a3-highgpu-8g", region=region, usd_per_hour=price)
        for region, price in (("europe-west4", "87.8"), ("us-east5", "88.2"), ("us-central1", "33.61"))
    )
    with pytest.raises(PriceError) as caught:
        parse_prices(HEADER + rows, "t.csv")
    assert str(caught.value) == (
        "t.csv:4: usd_per_hour = 33.61: 4.201 USD a chip in us-central1, where google's other regions ask 11: this is "
        "the price of another product; correct it or leave the row out"
    )


CATALOGUES = {
    "as it is": ("trn2,16", "1536", "667", None),
    "the catalogue's Trainium2": (
        "trn2,16",
        "8192",
        "",
        "t.csv:2: memory_gib = '8192': 16 trn2 have 1536 GiB: correct it",
    ),
    "the instance's memory for each chip": (
        "trn1,16",
        "8192",
        "",
        "t.csv:2: memory_gib = '8192': 16 trn1 have 512 GiB: this counts each chip 16 times",
    ),
    "one chip's memory": (
        "h100,8",
        "80",
        "",
        "t.csv:2: memory_gib = '80': 8 h100 have 640 GiB: this is the memory of one chip",
    ),
    "GB for GiB": (
        "h100,8",
        "687",
        "",
        "t.csv:2: memory_gib = '687': 8 h100 have 640 GiB: this is the number of GB",
    ),
    "sparse": (
        "h100,8",
        "",
        "1979",
        "t.csv:2: bf16_tflops = '1979': a h100 has 989 TFLOP/s (this is the sparse rate): correct it",
    ),
    "another chip's rate": (
        "trn2,16",
        "",
        "190",
        "t.csv:2: bf16_tflops = '190': a trn2 has 667 TFLOP/s: correct it",
    ),
    "v6e 230": ("v6e,8", "", "230", "t.csv:2: bf16_tflops = '230': a v6e has 918 TFLOP/s: correct it"),
}


@pytest.mark.parametrize("name", CATALOGUES)
def test_catalogues_from_elsewhere_are_compared_with_the_chips(name):
    chip, memory, rate, message = CATALOGUES[name]
    text = EXTRA + f"p,r,sku,{chip},30,on_demand,,example.com,2026-11-23,S,,{memory},{rate}\n"
    if message is None:
        assert len(parse_prices(text, "t.csv")) == 1
    else:
        with pytest.raises(PriceError) as caught:
            parse_prices(text, "t.csv")
        assert str(caught.value) == message
