"""Is an address one that can be asked at all? Half a minute of retries would not make it one."""

from __future__ import annotations

import re
import urllib.parse

_REMOTE = re.compile(r"(?P<scheme>https?|s3):", re.IGNORECASE)
_OUTSIDE_ASCII_OR_SPACE = re.compile(r"[^\x21-\x7e]")


def address_problem(url: str) -> str:
    """What is wrong with an http(s):// or s3:// address, and what to write; '' if nothing is."""
    found = _REMOTE.match(url)
    if found is None:
        return ""
    scheme = found["scheme"]
    if scheme != scheme.lower():
        return f"{url}: write {scheme.lower()}:// in small letters"
    host = "BUCKET" if scheme == "s3" else "HOST"
    if not re.match(rf"{scheme}://[^/]", url):
        return f"{url} names no {host.lower()}; write {scheme}://{host}/FOLDER"
    return "" if scheme == "s3" else _web_problem(url)


def _web_problem(url: str) -> str:
    if strange := _OUTSIDE_ASCII_OR_SPACE.search(url):
        quoted = urllib.parse.quote(strange[0])
        return f"{url} holds {strange[0]!r}, which a web address cannot; write {quoted} for it"
    try:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            return f"{url} names no host; write {parts.scheme}://HOST/FOLDER"
        _ = parts.port
    except ValueError as error:
        return f"{url} is not a web address: {error}; write http://HOST:PORT/FOLDER"
    if parts.query or parts.fragment:
        return (
            f"{url}: what follows {'?' if parts.query else '#'} would come before the names of its "
            "files; give the folder alone, and a server that wants no signature"
        )
    return ""
