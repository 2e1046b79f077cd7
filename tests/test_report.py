"""report: one file that opens without a network, quickly, and shows, finds and sorts what a captioner said."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_data import Dataset, rewrite, write_dataset
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from framecap import report
from framecap.errors import SettingsError
from framecap.report.doubt import doubt, flags, is_cyrillic, is_repeated
from framecap.report.gallery import BLOCK
from framecap.report.report import render
from framecap.report.thumbnails import thumbnail

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,900"),
)
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("report"), frames=300, per_video=50)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(data: Dataset, browser: webdriver.Chrome, tmp_path: Path) -> webdriver.Chrome:
    report.write_report(str(data.captions), str(tmp_path / "report.html"), str(data.frames))
    return opened(browser, tmp_path / "report.html")


def opened(browser: webdriver.Chrome, path: Path) -> webdriver.Chrome:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"
    return browser


def captions_on(page: webdriver.Chrome) -> list[str]:
    return [element.get_attribute("textContent") or "" for element in page.find_elements(By.CSS_SELECTOR, ".caption")]


def search(page: webdriver.Chrome, words: str) -> str:
    before = page.find_element(By.ID, "count").text
    page.find_element(By.ID, "search").send_keys(words)
    WebDriverWait(page, 5).until(lambda _: page.find_element(By.ID, "count").text != before)
    return page.find_element(By.ID, "count").text


def other_run(data: Dataset, folder: Path) -> Path:
    """A copy of the captions where every third caption has another word and all similarities are 0.02 higher."""
    shutil.copytree(data.captions, folder)
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            if row["caption"] is not None:
                row["caption"] += " днём" if number % 3 == 0 else ""
                row["caption_similarity"] += 0.02
        rewrite(path, pa.Table.from_pylist(rows, table.schema))
    return folder


def page_data(path: Path) -> dict[str, Any]:
    text = path.read_text()
    start = text.index('id="data">') + len('id="data">')
    data: dict[str, Any] = json.loads(text[start : text.index("</script>", start)])
    return data


@needs_browser
def test_it_opens_without_network_requests_or_console_errors(page: webdriver.Chrome) -> None:
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in urls)
    assert not [url for url in urls if url.startswith(("http", "ws", "ftp"))]


@needs_browser
def test_pictures_are_shown_and_the_most_doubtful_frame_comes_first(page: webdriver.Chrome) -> None:
    images = page.find_elements(By.CSS_SELECTOR, ".gallery img")
    assert len(images) > 20
    WebDriverWait(page, 5).until(lambda _: page.execute_script("return arguments[0].naturalWidth", images[0]) > 0)
    first = page.find_element(By.CSS_SELECTOR, ".gallery .frame")
    assert first.find_elements(By.CSS_SELECTOR, ".flag")


@needs_browser
def test_search_finds_words_of_captions_and_forgives_yo(page: webdriver.Chrome) -> None:
    count = search(page, "зеленый квадрат")
    assert 0 < int(count.split()[0]) < 60
    assert all("зелёный квадрат" in text for text in captions_on(page))
    assert search(page, " нет таких слов").startswith("0 of 300")


@needs_browser
def test_sorting_by_similarity_puts_the_lowest_first(page: webdriver.Chrome, data: Dataset) -> None:
    Select(page.find_element(By.ID, "sort")).select_by_value("similarity")
    table = pa.concat_tables([pq.read_table(file) for file in data.captions.rglob("day-*/*.parquet")])
    lowest = min(value for value in table["caption_similarity"].to_pylist() if value is not None)
    first = page.find_element(By.CSS_SELECTOR, ".gallery .numbers").text
    assert first.replace("\xa0", " ").startswith(f"sim {lowest:.2f}")


@needs_browser
def test_a_filter_keeps_only_frames_of_that_kind(page: webdriver.Chrome) -> None:
    Select(page.find_element(By.ID, "filter")).select_by_value("non_cyrillic")
    assert set(captions_on(page)) == {"the red circle on grass"}


@needs_browser
def test_videos_are_strips_in_time_order(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "view-videos").click()
    strip = page.find_element(By.CSS_SELECTOR, ".strip")
    assert "video-000" in strip.find_element(By.TAG_NAME, "h2").text
    ids = [frame.get_attribute("data-id") for frame in strip.find_elements(By.CSS_SELECTOR, ".frame")]
    assert len(ids) >= 12
    assert ids == sorted(ids)


@needs_browser
def test_scrolling_brings_the_rest_of_the_frames(page: webdriver.Chrome) -> None:
    def cards(_: object = None) -> int:
        page.execute_script("scrollTo(0, document.body.scrollHeight)")
        return len(page.find_elements(By.CSS_SELECTOR, ".gallery .frame"))

    assert cards() < 300
    WebDriverWait(page, 10).until(lambda _: cards() == 300)


@needs_browser
def test_a_frame_opens_with_all_its_values_and_steps_to_the_next(page: webdriver.Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, ".gallery .frame").click()
    dialog = page.find_element(By.ID, "detail")
    first = dialog.text
    assert "frame_id" in first
    dialog.find_element(By.XPATH, ".//button[text()='Next']").click()
    assert dialog.text != first
    dialog.find_element(By.XPATH, ".//button[text()='Close']").click()
    assert not dialog.is_displayed()


def with_embeddings(data: Dataset, folder: Path) -> tuple[Path, np.ndarray]:
    """A copy of the captions with random image embeddings, float16 [rows, 8], and those of all rows in shard order."""
    shutil.copytree(data.captions, folder)
    rng, all_rows = np.random.default_rng(3), []
    for path in sorted(p for p in folder.rglob("*.parquet") if "_framecap" not in p.parts):
        table = pq.read_table(path)
        values = rng.normal(size=(len(table), 8)).astype(np.float16)
        all_rows.append(values)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 8)
        rewrite(path, table.append_column("image_embedding", column))
    return folder, np.concatenate(all_rows).astype(np.float32)


def test_each_frame_names_those_nearest_by_embedding(data: Dataset, tmp_path: Path) -> None:
    captions, embeddings = with_embeddings(data, tmp_path / "captions")
    report.write_report(str(captions), str(tmp_path / "report.html"))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :6].tolist()
    frames = page_data(tmp_path / "report.html")["frames"]
    assert len(frames) == len(embeddings)
    assert {frame[0]: frame[-1] for frame in frames} == dict(enumerate(nearest))


@needs_browser
def test_a_frame_links_to_those_most_like_it(data: Dataset, browser: webdriver.Chrome, tmp_path: Path) -> None:
    captions, _ = with_embeddings(data, tmp_path / "captions")
    report.write_report(str(captions), str(tmp_path / "report.html"), str(data.frames))
    page = opened(browser, tmp_path / "report.html")
    page.find_element(By.CSS_SELECTOR, ".gallery .frame").click()
    dialog = page.find_element(By.ID, "detail")
    before = dialog.find_element(By.CSS_SELECTOR, "td").text
    links = dialog.find_elements(By.CSS_SELECTOR, ".alike .frame")
    assert len(links) == 6
    links[0].click()
    assert dialog.find_element(By.CSS_SELECTOR, "td").text != before


@needs_browser
def test_the_keyboard_alone_searches_steps_through_frames_and_closes(page: webdriver.Chrome) -> None:
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    page.find_element(By.CSS_SELECTOR, ".gallery .frame").send_keys(Keys.ENTER)
    dialog = page.find_element(By.ID, "detail")
    seen = [dialog.find_element(By.CSS_SELECTOR, "td").text]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):
        page.switch_to.active_element.send_keys(key)
        seen.append(dialog.find_element(By.CSS_SELECTOR, "td").text)
    assert len(set(seen)) == 3
    assert seen[3] == seen[1]
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


@needs_browser
def test_where_nothing_fits_one_button_brings_all_frames_back(page: webdriver.Chrome) -> None:
    search(page, "нет таких слов")
    page.find_element(By.CSS_SELECTOR, ".nothing button").click()
    assert page.find_element(By.ID, "count").text.startswith("300 of 300")
    assert len(captions_on(page)) > 20


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page: webdriver.Chrome, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for view in ("view-videos", "view-frames"):
            page.find_element(By.ID, view).click()
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
@pytest.mark.parametrize("width", [768, 1024, 1280])
def test_every_row_of_the_run_in_figures_is_filled_and_holds_more_than_one_card(
    browser: webdriver.Chrome, tmp_path: Path, width: int
) -> None:
    data = write_dataset(tmp_path, frames=120)
    (data.captions / "day-1/frames-00001.parquet").write_bytes(b"PAR1 but no more")
    stages = {"stage_seconds": {"decode": 1234.0}, "stage_frames_per_second": {"decode": 20000.0}}
    for name in ("20260102-000000-abcd", "20260103-000000-abcd"):
        path = data.captions / "_framecap/runs" / name / "summary.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"run_id": name, "captioned_rows": 60} | stages))
    report.write_report(str(data.captions), str(tmp_path / "report.html"))
    page = opened(browser, tmp_path / "report.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.execute_script("document.getElementById('numbers').open = true")
        text = page.find_element(By.ID, "panels").text
        assert "unreadable 1 shard" in text
        assert "1,234 20,000" in text
        places = "return [...document.querySelectorAll('.panel')].map(p => [p.offsetTop, p.offsetLeft + p.offsetWidth])"
        edge = page.execute_script("const p = document.getElementById('panels'); return p.offsetLeft + p.offsetWidth")
        for cards in (7, 6, 5, 4):
            found = page.execute_script(places)
            assert len(found) == cards
            tops = [top for top, _ in found]
            assert min(tops.count(top) for top in tops) > 1
            assert all(abs(max(right for top, right in found if top == row) - edge) <= 1 for row in tops)
            last = "errors" if cards == 7 else "last"
            page.execute_script(
                "const all = [...document.querySelectorAll('.panel')];"
                "(arguments[0] === 'errors' ? all.find(p => p.matches('.wide')) : all.at(-1)).remove()",
                last,
            )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_dark_follows_the_system(page: webdriver.Chrome) -> None:
    def paper(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    assert paper("dark") == "rgb(20, 22, 23)"
    assert paper("light") == "rgb(246, 246, 244)"


@needs_browser
def test_two_runs_stand_side_by_side(data: Dataset, browser: webdriver.Chrome, tmp_path: Path) -> None:
    other = other_run(data, tmp_path / "other")
    report.write_report(str(data.captions), str(tmp_path / "report.html"), str(data.frames), str(other))
    page = opened(browser, tmp_path / "report.html")
    Select(page.find_element(By.ID, "filter")).select_by_value("changed")
    cards = page.find_elements(By.CSS_SELECTOR, ".gallery .frame")
    assert cards
    for card in cards[:10]:
        own = card.find_element(By.CSS_SELECTOR, ".caption").text
        assert card.find_element(By.CSS_SELECTOR, ".other").text == own + " днём"
    change = page_data(tmp_path / "report.html")["change"]
    assert change["similarity_change"] == pytest.approx(0.02, abs=1e-5)
    assert 95 <= change["changed"] <= 105
    assert page.get_log("browser") == []


@needs_browser
def test_five_thousand_frames_open_in_three_seconds(browser: webdriver.Chrome, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 117, 208, 3), dtype=np.uint8)
    pictures = []
    for pixels in noise:
        Image.fromarray(pixels).save(tmp_path / "noise.jpg", quality=95)
        pictures.append(thumbnail((tmp_path / "noise.jpg").read_bytes(), 4700) or "")
    row = ["video", 4000, "человек идёт по дороге мимо дома", "ok", None, -0.4, -1.0, 9, 0.31, [], 0.4]
    frames = [[i, f"v/{i:06d}", *row, divmod(i, BLOCK), None, None] for i in range(5000)]
    report.write_report(str(write_dataset(tmp_path / "d", 3).captions), str(tmp_path / "small.html"))
    page = page_data(tmp_path / "small.html") | {"frames": frames}
    (tmp_path / "report.html").write_text(render(page, [pictures[i % 40] for i in range(5000)]))
    assert 15_000_000 < (tmp_path / "report.html").stat().st_size < 30_000_000
    seconds = []
    for _ in range(3):  # the best of three: this machine has other work
        opened(browser, tmp_path / "report.html")
        seconds.append(
            browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
        )
    assert min(seconds) < 3
    assert browser.find_element(By.ID, "count").text.startswith("5,000 of 5,000")


def test_a_thumbnail_keeps_to_its_budget_whatever_the_frame(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (720, 1280, 3), dtype=np.uint8)).save(tmp_path / "n.png")
    small = thumbnail((tmp_path / "n.png").read_bytes(), 4700)
    assert small is not None
    assert len(small) <= 4700
    assert thumbnail(b"no picture", 4700) is None


def test_figures_count_every_row_while_the_gallery_keeps_to_its_limit(data: Dataset, tmp_path: Path) -> None:
    options = report.ReportOptions(limit=50)
    shown = report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames), options=options)
    page = page_data(tmp_path / "r.html")
    assert page["figures"]["rows"] == 300
    assert (shown.shown, shown.rows) == (50, 300)
    assert sum(page["figures"]["statuses"].values()) == 300
    assert page["figures"]["errors"][0]["kind"] == "truncated"
    truncated = page["figures"]["statuses"]["truncated"]
    assert sum(frame[5] == "truncated" for frame in page["frames"]) == truncated


def test_a_caption_cannot_break_out_of_the_page() -> None:
    html = render({"title": "</script><script>alert(1)</script>"}, [])
    assert "<script>alert" not in html


def test_frames_instead_of_captions_are_a_mistake_and_no_empty_page(data: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(SettingsError, match=r"no caption shard that can be read.*no column 'caption"):
        report.write_report(str(data.frames), str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "said"), [("frames", "--frames /none"), ("against", "--against /none"), ("out", "is a folder")]
)
def test_a_mistaken_place_is_told_before_any_reading(data: Dataset, tmp_path: Path, wrong: str, said: str) -> None:
    places = {"out": str(tmp_path / "report.html")} | {wrong: str(tmp_path) if wrong == "out" else "/none"}
    with pytest.raises(SettingsError, match=said):
        report.write_report(str(data.captions), **places)


def test_damaged_shards_are_on_the_page_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path)
    (data.captions / "day-0/frames-00000.parquet").write_bytes(b"PAR1 but no more")
    out = tmp_path / "report.html"
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(data.captions), "--out", str(out)])) == 3
    assert "day-0/frames-00000.parquet could not be read" in capsys.readouterr().err
    assert list(page_data(out)["unreadable"]) == ["day-0/frames-00000.parquet"]


def damage(path: Path, column: int) -> None:
    """Overwrite the pages of a column; the footer stays whole."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(column)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)


def test_damaged_pages_cost_their_shards_and_not_the_page(tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    damage(data.captions / "day-0/frames-00000.parquet", 0)
    damage(data.frames / "day-1/frames-00001.parquet", 6)
    written = report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames))
    assert list(written.unreadable) == ["day-0/frames-00000.parquet"]
    assert (written.shown, written.pictures) == (40, 20)


def test_scores_that_are_no_numbers_are_left_empty(tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    path = data.captions / "day-0/frames-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["caption_similarity"], rows[2]["caption_logprob"] = float("nan"), float("-inf")
    rewrite(path, pa.Table.from_pylist(rows, table.schema))
    for against in (None, str(data.captions)):
        report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames), against)
        text = (tmp_path / "r.html").read_text()
        assert len(page_data(tmp_path / "r.html")["frames"]) == 60
        assert "NaN" not in text.partition('id="data">')[2].partition("</script>")[0]


def test_pictures_beside_their_shard_are_found_from_anywhere(tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    path = data.frames / "day-0/frames-00000.parquet"
    table = pq.read_table(path)
    names = [f"picture-{row}.jpg" for row in range(len(table))]
    for name, image in zip(names, table["image"].to_pylist(), strict=True):
        (path.parent / name).write_bytes(image)
    pq.write_table(table.drop_columns("image").append_column("image_uri", pa.array(names)), path)
    written = report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames))
    assert written.pictures == 60


def test_what_a_captioner_says_of_itself_is_on_the_page(data: Dataset, tmp_path: Path) -> None:
    captions = Path(shutil.copytree(data.captions, tmp_path / "captions"))
    run = captions / "_framecap" / "runs" / "9"
    run.mkdir(parents=True)
    told = {"run_id": "9", "captioned_rows": 300, "notice": "knows only drawings"}
    (run / "summary.json").write_text(json.dumps(told))
    report.write_report(str(captions), str(tmp_path / "r.html"))
    assert page_data(tmp_path / "r.html")["runs"][0]["notice"] == "knows only drawings"
    assert 'id="notice"' in (tmp_path / "r.html").read_text()


def test_no_caption_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no caption shards"):
        report.write_report(str(tmp_path), str(tmp_path / "report.html"))


def test_the_command_writes_the_page(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    out = str(tmp_path / "r.html")
    assert report.run(parser.parse_args([str(data.captions), "--frames", str(data.frames), "--out", out])) == 0
    assert "300 frames shown (all there are)" in capsys.readouterr().out
    assert report.run(parser.parse_args([str(data.captions), "--limit", "50", "--out", out])) == 0
    assert "50 frames shown (of 300; --limit shows more)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("кот и кот и кот", True),
        ("дом дом дом", True),
        ("дом у дороги", False),
        ("красный круг и красный квадрат", False),
        ("на столе и на полу и на стуле", False),
    ],
)
def test_a_caption_that_repeats_itself_is_noticed(text: str, repeated: bool) -> None:
    assert is_repeated(text) is repeated


def test_latin_text_is_doubtful_and_a_brand_is_not() -> None:
    assert not is_cyrillic("a man on a horse")
    assert is_cyrillic("автомобиль BMW стоит у большого дома")


def test_doubt_grows_with_flags_and_falls_with_similarity() -> None:
    row = {"caption": "дом", "caption_status": "ok", "caption_similarity": 0.3, "caption_logprob": -1.0}
    better, cut = row | {"caption_similarity": 0.4}, row | {"caption_status": "truncated", "caption_similarity": 0.9}
    assert doubt(better, flags(better)) < doubt(row, flags(row)) < doubt(cut, flags(cut))
