import pytest

from modalkit.benchmarks.simulate.tables import DEVICES, CostTable, load_table, table_from_json, table_to_json

TABLE = CostTable("made up", "nowhere", [1, 4, 16], [10, 40], [[0.010, 0.010], [0.010, 0.030], [0.040, 0.120]])


@pytest.mark.parametrize("name", DEVICES)
def test_a_committed_table_gives_its_own_points_back(name: str) -> None:
    table = load_table(name)
    for count, row in zip(table.batch_sizes, table.seconds_at, strict=True):
        for size, seconds in zip(table.sizes, row, strict=True):
            assert table.seconds(count, size) == pytest.approx(seconds, rel=1e-12)


def test_half_way_in_the_logarithms_is_the_geometric_mean() -> None:
    assert TABLE.seconds(8, 10) == pytest.approx((0.010 * 0.040) ** 0.5)
    assert TABLE.seconds(4, 20) == pytest.approx((0.010 * 0.030) ** 0.5)
    assert TABLE.seconds(8, 20) == pytest.approx((0.010 * 0.040 * 0.030 * 0.120) ** 0.25)


def test_outside_the_grid_the_last_slope_goes_on_but_never_steeper_than_in_proportion() -> None:
    assert TABLE.seconds(32, 10) == pytest.approx(0.080)
    assert TABLE.seconds(1, 80) == pytest.approx(0.010)
    falling = CostTable("falling", "nowhere", [1, 2], [1, 2], [[0.4, 0.2], [0.4, 0.2]])
    assert falling.seconds(1, 4) == pytest.approx(0.2)
    steep = CostTable("steep", "nowhere", [1, 2], [1, 2], [[0.1, 0.1], [0.9, 0.9]])
    assert steep.seconds(4, 1) == pytest.approx(1.8)


def test_many_short_requests_do_not_become_cheaper_than_one() -> None:
    steep = CostTable("steep", "nowhere", [1, 8], [32, 64], [[0.010, 0.010], [0.010, 0.020]])
    assert steep.seconds(8, 48) == pytest.approx(0.015)
    assert steep.seconds(8, 16) == pytest.approx(0.010)


def test_a_table_survives_its_file() -> None:
    assert table_from_json(table_to_json(TABLE)) == TABLE


@pytest.mark.parametrize(
    ("batch_sizes", "sizes", "seconds_at", "message"),
    [
        ([1], [1, 2], [[1.0, 1.0]], "batch_sizes must be two or more rising"),
        ([1, 2], [2, 2], [[1.0, 1.0], [1.0, 1.0]], "sizes must be two or more rising"),
        ([1, 2], [1, 2], [[1.0, 1.0]], "expected 2 rows of 2"),
        ([1, 2], [1, 2], [[1.0, 1.0], [1.0, 0.0]], "must be positive"),
    ],
)
def test_what_is_no_grid_is_refused(
    batch_sizes: list[int], sizes: list[int], seconds_at: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CostTable("wrong", "nowhere", batch_sizes, sizes, seconds_at)


def test_a_device_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="'h900'; there are cpu-2-cores"):
        load_table("h900")


def test_each_table_names_its_source() -> None:
    for name in DEVICES:
        assert len(load_table(name).source) > 20
