"""Which addresses a webhook may be sent to: those of the internet, in whatever form they are written.

A name is resolved and all of its addresses are checked; the connection is made to one that was, not to the name again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.ip_network("::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""Whatever is outside, e.g. the local prefixes of NAT64 (RFC 8215), is not of the internet, though `is_global` may say so."""

_DOCUMENTATION = ipaddress.ip_network("3fff::/20")
_SIXTOFOUR = ipaddress.ip_network("2002::/16")


class AddressRefused(Exception):
    """An address that nothing is sent to."""


def is_public(address: Address) -> bool:
    """Whether it is an address of the internet, also if it holds an IPv4 address in one of the forms that IPv6 has for that."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded(address)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST or address in _DOCUMENTATION:
            return False
    return address.is_global and not address.is_multicast


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _SIXTOFOUR:
        return ipaddress.IPv4Address((int(address) >> 80) & 0xFFFFFFFF)
    if address.teredo is not None:
        return address.teredo[1]
    return None


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name.

    Raises:
        OSError: there are none.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except UnicodeError:  # e.g. a label of more than 63 characters
        raise OSError(f"{host} is no name of a host") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_all(host: str, addresses: Sequence[str]) -> list[str]:
    """The addresses, if every one of them is public.

    Raises:
        AddressRefused: one is not, or there are none.
    """
    if not addresses:
        raise AddressRefused(f"{host} has no address")
    for text in addresses:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            raise AddressRefused(f"{host} resolves to something that is not an IP address") from None
        if not is_public(address):
            raise AddressRefused(f"{host} resolves to an address that is not public")
    return list(addresses)
