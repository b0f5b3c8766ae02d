"""The page of `explore` in a real browser: opened from the disk, without a network, its console silent."""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.untrained import init
from torch_ref import convert
from vae_jax import VAE
from vae_jax.config import ExploreConfig
from vae_jax.core import model, objective
from vae_jax.explore import explore
from vae_jax.runs.trained import read

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
AXE = os.environ.get("VAE_JAX_AXE", "")  # axe.min.js of the npm package axe-core
DRAWS = 20


def require(present: object, what: str) -> None:
    """Skips the test where something is not installed; with VAE_JAX_BROWSER=required, as in CI, it fails instead."""
    if not present:
        (pytest.fail if os.environ.get("VAE_JAX_BROWSER") == "required" else pytest.skip)(f"needs {what}")


class Browser:
    """Chromium with one page at a time."""

    def __init__(self, folder: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(20)
        self.downloads = folder / "downloads"
        self.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # of the browser's own first page
        self.devtools("Network.enable")
        self.devtools(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )

    def devtools(self, command: str, **parameters: object) -> None:
        self.driver.execute_cdp_cmd(command, parameters)

    def open(self, page: Path, hash: str = "", size: tuple[int, int] = (1280, 860), phone: bool = False) -> None:
        """Opens a page, and waits until it has decoded its first place."""
        width, height = size
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self.driver.get("about:blank")
        self.driver.get(page.as_uri() + hash)
        self.wait("return document.getElementById('output-name').textContent")

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        """Waits until the script returns something true."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, poll_frequency=0.05).until(lambda _: self.run(script), script)

    def frames(self) -> None:
        """Waits until the page has drawn what has just happened."""
        self.driver.execute_async_script(
            "const next = requestAnimationFrame, done = arguments[0]; next(() => next(() => next(done)))"
        )

    def find(self, css: str):
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        return self.find(css).text

    def pointer(self, css: str, *path: tuple[float, float], kind: str = "mouse") -> None:
        """Puts a pointer down on an element, moves it along a path in parts of the element's size, and lifts it."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        element = self.find(css)
        self.run("arguments[0].scrollIntoView({ block: 'center' })", element)
        box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", element)
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=10)
        places = [(round(box[0] + x * box[2]), round(box[1] + y * box[3])) for x, y in path]
        actions.pointer_action.move_to_location(*places[0]).pointer_down()
        for place in places[1:]:
            actions.pointer_action.move_to_location(*place)
        actions.pointer_action.pointer_up()
        actions.perform()
        self.frames()

    def keys(self, css: str, *keys: str) -> None:
        self.find(css).send_keys(*keys)
        self.frames()

    def choose(self, css: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.find(css)).select_by_value(value)
        self.frames()

    def z(self) -> np.ndarray:
        return np.array(self.run("return [...vae.place.z]"), np.float32)

    def image(self) -> dict | None:
        """What the page says about the chosen image."""
        return self.run("const i = vae.place.image; return i && { name: i.name, pixels: [...i.pixels], mu: [...i.mu] }")

    def press(self, css: str) -> None:
        self.find(css).click()
        self.frames()

    def require_silent(self) -> None:
        """The console is empty, and the page has asked for nothing but itself."""
        assert [entry["message"] for entry in self.driver.get_log("browser")] == []
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert {url.partition(":")[0] for url in sent} <= {"file", "data", "blob", "about"}, sent
        assert {url for url in sent if url.startswith("file:") and ".html" not in url} == set()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    require(CHROMIUM and DRIVER, "chromium and chromedriver (Debian: chromium, chromium-driver)")
    try:
        import selenium  # noqa: F401
    except ImportError:
        require(False, "the package selenium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(started):
    yield started
    started.require_silent()


def make(folder: Path, params: model.Params, images: np.ndarray, **options) -> Path:
    """Writes a weights file, a set of test images, and the page of both."""
    labels = np.arange(len(images)) % 10
    np.savez(
        folder / "set.npz", train_images=images[:1], train_labels=labels[:1], test_images=images, test_labels=labels
    )
    convert.save(convert.to_state_dict(jax.device_get(params)), folder / "vae.pth")
    out = folder / "page.html"
    explore(ExploreConfig(folder / "vae.pth", out, data=str(folder / "set.npz"), images=len(images), **options))
    return out


@pytest.fixture(scope="module")
def pages(tmp_path_factory, trained, few_images):
    """The pages by name: made when first asked for, each in a folder with its weights and images."""
    colours = np.random.default_rng(0).integers(0, 256, (100, 9, 7, 3)).astype(np.uint8)
    digits = few_images.test_images[:100]
    # Posteriors of untrained models differ too little from the prior to compare their KLD.
    wide = functools.partial(jax.tree.map, lambda array: 3 * array)
    made = {
        "default": lambda folder: make(folder, trained, digits),
        "half": lambda folder: make(folder, trained, digits, half=True),
        "flat": lambda folder: make(folder, wide(init(VAE(16, 2))), digits),
        "colour": lambda folder: make(folder, wide(init(VAE(24, 5, 189))), colours),
    }
    return functools.cache(lambda name: made[name](tmp_path_factory.mktemp(name)))


def require_close(found: object, expected: object, tolerance: float = 1e-5) -> None:
    """Row by row: the largest difference, relative to the largest value."""
    found, expected = np.array(found), np.asarray(expected)
    assert found.shape == expected.shape
    rows = (len(expected), -1)
    difference = np.abs(found - expected).reshape(rows).max(1)
    assert (difference <= tolerance * np.abs(expected).reshape(rows).max(1)).all(), difference.max()


@pytest.mark.parametrize("name", ["default", "flat", "colour"])
def test_its_figures_equal_those_of_jax(browser, pages, name):
    page = pages(name)
    browser.open(page)
    trained = read(page.parent / "vae.pth")
    with np.load(page.parent / "set.npz") as file:
        pixels = file["test_images"].reshape(100, -1).astype(np.float32) / 255
    eps = np.random.default_rng(1).standard_normal((100, DRAWS, trained.latent_dim), np.float32)
    params, x, draws = jax.tree.map(jnp.asarray, (trained.params, pixels, eps))
    output = model.forward(trained.model, params, x, draws[:, 0])
    losses = objective.losses(output, x)
    mu, logvar = model.posterior(trained.model, params, x)
    z = model.reparameterize(mu[:, None], logvar[:, None], draws)
    weights = objective.log_weights(model.decode_logits(trained.model, params, z), x, z, draws, logvar)
    found = browser.run(
        """
        return vae.images.map(({ pixels }, i) => {
          const { mu, logvar } = vae.encode(pixels);
          const z = mu.map((mean, j) => mean + Math.exp(logvar[j] / 2) * arguments[0][i][0][j]);
          return { pixels: [...pixels], mu: [...mu], logvar: [...logvar], logits: [...vae.decode(z)],
            ...vae.losses(pixels, arguments[0][i][0]), logPx: vae.logPx(pixels, arguments[0][i]) };
        });
        """,
        eps.tolist(),
    )

    def column(key: str) -> list:
        return [row[key] for row in found]

    np.testing.assert_array_equal(np.array(column("pixels"), np.float32), pixels)
    for key in ("mu", "logvar", "logits"):
        require_close(column(key), getattr(output, key))
    for key in ("bce", "kld", "loss"):
        require_close(column(key), getattr(losses, key))
    weights = np.asarray(weights, np.float64)
    shares = np.exp(weights - weights.max(axis=1, keepdims=True))
    log_px = weights.max(axis=1) + np.log(shares.mean(axis=1))
    require_close([estimate["value"] for estimate in column("logPx")], log_px)
    errors = shares.std(axis=1, ddof=1) / np.sqrt(DRAWS) / shares.mean(axis=1)
    require_close([estimate["error"] for estimate in column("logPx")], errors, 1e-3)  # the weights are exponentials


def test_half_precision_is_that_of_the_rounded_weights(browser, pages):
    page = pages("half")
    browser.open(page)
    full = read(page.parent / "vae.pth")
    rounded = jax.tree.map(lambda array: jnp.asarray(np.float16(array).astype(np.float32)), full.params)
    with np.load(page.parent / "set.npz") as file:
        pixels = file["test_images"].reshape(100, -1).astype(np.float32) / 255
    mu, logvar = model.encode(full.model, rounded, jnp.asarray(pixels))
    found = browser.run("return vae.images.map(({ pixels }) => [...vae.encode(pixels).mu])")
    require_close(found, mu)
    require_close(browser.run("return vae.images.map(({ mu }) => [...mu])"), mu)
    require_close(browser.run("return vae.images.map(({ logvar }) => [...logvar])"), logvar)
    require_close(found, full.encode(pixels)[0], 2e-3)
    assert page.stat().st_size < 0.55 * pages("default").stat().st_size


def test_the_map(browser, pages):
    browser.open(pages("default"))
    before = browser.z()
    browser.pointer("#map", (0.3, 0.3), (0.4, 0.4), (0.5, 0.5))  # a drag, to the middle: 0 in both dimensions shown
    after = browser.z()
    assert (np.abs(after[before != after]) < 0.05).all() and (before != after).sum() == 2
    assert browser.image()["name"] == "test image 0, label 0"
    assert browser.text("#output-name") == "decoded, moved away"
    browser.keys("#map", "\ue014")  # arrow right
    assert np.abs(browser.z() - after).max() == pytest.approx(0.1)
    browser.keys("#map", "\ue007")  # enter: the nearest image
    image = browser.image()
    np.testing.assert_array_equal(browser.z(), np.array(image["mu"], np.float32))
    browser.press("#prior")
    assert browser.image() is None
    # The image on the map is hit where it is drawn.
    browser.keys("#map", "\ue011", "\ue007")
    here = browser.image()
    place = browser.run(
        """
        const shown = vae.images.flatMap(({ mu }) => arguments[0].map((dimension) => Math.abs(mu[dimension])));
        const reach = Math.max(3.05, ...shown) * 1.06;
        const { mu } = vae.place.image;
        return [(mu[arguments[0][0]] / reach + 1) / 2, (1 - mu[arguments[0][1]] / reach) / 2];
        """,
        (dimensions := [int(d) for d in re.findall(r"z(\d+)", browser.text("#map-caption"))]),
    )
    assert len(dimensions) == 2
    browser.press("#prior")
    browser.pointer("#map", tuple(place))
    assert browser.image()["name"] == here["name"]
    browser.pointer("#map", (0.2, 0.2), (0.25, 0.25), kind="touch")
    assert browser.text("#output-name") == "decoded, moved away"
    for axes in ("pca", "any", "kld"):
        browser.choose("#map-axes", axes)
        assert ("principal component 1" in browser.text("#map-caption")) == (axes == "pca")
    browser.press("#map-legend button:nth-child(4)")
    assert browser.find("#map-legend button:nth-child(4)").get_attribute("aria-pressed") == "true"


def test_the_dials(browser, pages):
    browser.open(pages("default"))
    before = browser.z()
    first = browser.find("#live-dials input").get_attribute("id")
    dimension = int(first[1:])
    browser.pointer(f"#{first}", (0.5, 0.5), (0.6, 0.5), (0.9, 0.5))
    assert browser.z()[dimension] == pytest.approx(3.2, abs=0.2)
    browser.keys(f"#{first}", "\ue012")  # arrow left
    assert np.delete(browser.z() - before, dimension).tolist() == [0] * 19
    browser.pointer("#live-dials li canvas", (0.5 / 9, 0.5), kind="touch")
    assert browser.z()[dimension] == -4
    browser.press("#back")
    np.testing.assert_array_equal(browser.z(), before)
    # The strip has caught up: its middle tile is the picture at 0.
    browser.frames()
    strip, expected = browser.run(
        """
        const strip = document.querySelector("#live-dials canvas");
        const pixels = strip.getContext("2d").getImageData(4 * 28, 0, 28, 28).data;
        const logits = vae.decode(vae.place.z.with(arguments[0], 0));
        return [[...pixels].filter((_, i) => i % 4 === 0), [...logits]];
        """,
        dimension,
    )
    np.testing.assert_allclose(np.array(strip) / 255, 1 / (1 + np.exp(-np.array(expected))), atol=0.51 / 255)
    browser.press("#origin")
    assert not browser.z().any()
    browser.press("#random")
    assert browser.image()["name"].startswith("test image")
    browser.find("#number").clear()
    browser.keys("#number", "7", "\ue007")
    assert browser.image()["name"] == "test image 6, label 6"


ZERO = [(0.5 + 0.3 * np.sin(angle), 0.5 - 0.4 * np.cos(angle)) for angle in np.linspace(0, 6.2, 16)]


@pytest.mark.parametrize("kind", ["mouse", "touch", "pen"])
def test_drawing(browser, pages, kind):
    browser.open(pages("default"), phone=kind == "touch", size=(390, 844) if kind == "touch" else (1280, 860))
    browser.press("#tab-draw")
    browser.pointer("#pad", *ZERO, kind=kind)
    image = browser.image()
    assert image["name"] == "your drawing"
    require_like_mnist(np.array(image["pixels"]).reshape(28, 28))
    mu, _ = read(pages("default").parent / "vae.pth").encode(np.array([image["pixels"]], np.float32))
    require_close([browser.z()], mu)
    if kind != "mouse":
        return
    browser.wait("return /of 1000 draws carry/.test(document.getElementById('draws-note').textContent)")
    figures = [float(browser.text(f"#{name}").replace("\u2212", "-").split()[0]) for name in ("bce", "kld", "loss")]
    assert figures[2] == pytest.approx(figures[0] + figures[1], abs=0.02)
    assert -figures[2] < float(browser.text("#log-px").replace("\u2212", "-").split()[0])
    browser.press("#undo")
    assert not any(browser.image()["pixels"])


def require_like_mnist(image: np.ndarray) -> None:
    """As MNIST's images are: in a box of 20 x 20, their centre of mass at pixel 14."""
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) in ((20, 15), (20, 16), (20, 14))
    for axis in (0, 1):
        assert (image.sum(axis=1 - axis) @ np.arange(28)) / image.sum() == pytest.approx(14, abs=0.51)
    assert image.max() == pytest.approx(1, abs=0.01)
    assert ((image > 0.05) & (image < 0.95)).sum() > 20  # antialiased


def test_drawing_by_keyboard(browser, pages):
    browser.open(pages("default"))
    browser.press("#tab-draw")
    browser.keys("#pad", " ", *["\ue015"] * 12, " ")
    one = np.array(browser.image()["pixels"]).reshape(28, 28)
    assert one.any(axis=1).sum() == 20 and one.any(axis=0).sum() <= 6
    browser.keys("#pad", "\ue003")
    assert not any(browser.image()["pixels"])


def test_colour_models_have_no_pad(browser, pages):
    browser.open(pages("colour"))
    browser.press("#tab-draw")
    assert "draws in grey" in browser.text("#no-pad") and not browser.find("#pad").is_displayed()


def test_between(browser, pages):
    browser.open(pages("default"))
    a, b = (np.array(mu, np.float32) for mu in browser.run("return [0, 1].map((i) => [...vae.images[i].mu])"))
    browser.press("#tab-between")
    browser.pointer("#film", (0.5, 0.5))
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    np.testing.assert_allclose(browser.z(), (a + b) * np.sin(angle / 2) / np.sin(angle), atol=1e-5)
    browser.choose("#path", "linear")
    browser.pointer("#film", (0.5, 0.5), kind="touch")
    np.testing.assert_allclose(browser.z(), (a + b) / 2, atol=1e-6)
    browser.press("#set-a")
    browser.keys("#way", "\ue010")  # end
    np.testing.assert_allclose(browser.z(), b, atol=1e-6)
    browser.press("#play")
    browser.wait("return document.getElementById('way').value < 0.9")
    browser.press("#play")
    stopped = browser.z()
    browser.frames()
    np.testing.assert_array_equal(browser.z(), stopped)


def test_take_away(browser, pages):
    browser.open(pages("default"))
    browser.press("#prior")
    z = browser.z()
    browser.press("#tab-take")
    for name, button in (("latent.json", "#save-json"), ("decoded.png", "#save-png")):
        browser.press(button)
        for _ in range(200):
            if not (browser.downloads / name).exists():
                browser.frames()
    assert np.array_equal(np.float32(json.loads((browser.downloads / "latent.json").read_text())["z"]), z)
    from PIL import Image

    with Image.open(browser.downloads / "decoded.png") as picture:
        assert picture.size == (504, 504)
    browser.press("#make-link")
    link = browser.find("#link").get_attribute("value")
    # The link leads to the same place, axes and tab; what a stranger has put into it does no harm.
    browser.open(pages("default"), hash="#" + link.partition("#")[2])
    np.testing.assert_array_equal(browser.z(), z)
    assert browser.find("#take").is_displayed() and browser.image() is None
    browser.run("location.hash = 'image=3&axes=1,2&tab=draw'")
    browser.wait("return vae.place.image?.number === 3 && !document.getElementById('draw').hidden")
    assert "Across: z1," in browser.text("#map-caption")
    for hostile in ("z=%3Cimg%3E&tab=</script>&axes=9,9&image=-1", "z=AAAA", "%", "axes=999,1&z=" + "f" * 9999):
        browser.run("location.hash = arguments[0]", hostile)
        browser.frames()
    assert browser.image()["name"] == "test image 3, label 3"


@pytest.mark.parametrize(("scheme", "size"), [("light", (1280, 860)), ("dark", (390, 844))])
def test_readable_for_all(browser, pages, scheme, size):
    require(AXE, "axe-core (npm install axe-core; VAE_JAX_AXE=.../axe.min.js)")
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(pages("default"), size=size, phone=size[0] < 500)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.run(Path(AXE).read_text())
    for tab in ("dials", "draw", "between", "take"):
        browser.press(f"#tab-{tab}")
        found = browser.driver.execute_async_script(
            "const done = arguments[0]; const told = ({ id, nodes }) => [id, nodes.map((node) => node.html)];"
            "axe.run().then(({ violations }) => done(violations.map(told)))"
        )
        assert found == []
