"""A place by URL where pathlib knows local ones only: parent, name, `/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class UrlPath:
    """A folder or file by URL (s3://, memory://, ...); reads nothing itself."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> UrlPath:
        return UrlPath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url


Place = Path | UrlPath


def place_of(url: str) -> Place:
    """A local folder as an absolute path, anything else by its URL."""
    if "://" in url and not url.startswith("file://"):
        return UrlPath(url.rstrip("/"))
    return Path(url.removeprefix("file://")).absolute()
