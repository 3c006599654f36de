"""Authentication by bearer tokens: listed by their digests in an authorization file, or JWT of an issuer that it names.

docs/security.md describes the file. It and the issuer's keys are reloaded while the proxy runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import urllib.request
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import jwt
import msgspec
import structlog

from proxy.guard import NO_CREDENTIALS
from splitserve.errors import Unauthenticated, Unavailable
from splitserve.server.callers import Caller
from splitserve.watched import Watched

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Asymmetric ones only: the key of an HMAC would have to be kept secret here."""

MAX_TOKEN_LENGTH = 8 * 1024
MAX_KEYS_BYTES = 1024 * 1024
KEYS_INTERVAL_S = 300.0
"""How often keys are fetched from a URL; sooner when a token names an unknown key, but not within `KEYS_RETRY_S`."""
KEYS_RETRY_S = 10.0
FETCH_TIMEOUT_S = 5.0
N_REMEMBERED = 10_000
REMEMBERED_S = 60.0
"""How long a verified JWT is cached, if it does not expire earlier."""

MAX_SUBJECT_LENGTH = 255
"""Of a JWT whose caller is named by its subject. Source: OpenID Connect Core 1.0, section 2, "sub"."""

WRONG_CREDENTIALS = "the credentials are not valid"
"""The only message for an invalid token: it does not reveal whether the token is unknown, expired, or of another issuer."""


class ListedToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token by the SHA-256 of its text, in hexadecimal, and the rights of its bearer."""

    name: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    models: tuple[str, ...] = ()
    operator: bool = False


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rights of the bearer of a JWT whose claims match these patterns; of a claim that is a list, one element has to match."""

    claims: dict[str, str]
    models: tuple[str, ...] = ()
    operator: bool = False


class Issuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The accepted issuer of JWT. ``jwks`` is an https URL, or a path relative to the authorization file."""

    issuer: str
    audience: str
    jwks: str
    grants: tuple[Grant, ...]
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    leeway_s: Annotated[float, msgspec.Meta(ge=0, le=300)] = 10.0


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An authorization file."""

    tokens: tuple[ListedToken, ...] = ()
    jwt: Issuer | None = None


def read_policy(path: str) -> Policy:
    """Raises:
    OSError: the file, or the one with the keys, cannot be read.
    ValueError: the file is invalid; the message names the field.
    """
    try:
        policy = msgspec.json.decode(Path(path).read_bytes(), type=Policy)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if len({token.sha256 for token in policy.tokens}) < len(policy.tokens):
        raise ValueError(f"{path}: expected each token once, got two with the same sha256")
    if policy.jwt:
        _check_issuer(path, policy.jwt)
    return policy


def _check_issuer(path: str, issuer: Issuer) -> None:
    if unknown := set(issuer.algorithms) - set(ALGORITHMS):
        raise ValueError(f"{path}: algorithms: {', '.join(sorted(unknown))}: expected some of {', '.join(ALGORITHMS)}")
    if not issuer.algorithms or not issuer.issuer or not issuer.audience:
        raise ValueError(f"{path}: jwt: issuer, audience and algorithms are required to reject tokens of others")
    url = urlsplit(issuer.jwks)
    if "://" not in issuer.jwks:
        read_keys(_beside(path, issuer.jwks))
    elif url.scheme != "https" and not (url.scheme == "http" and url.hostname in ("127.0.0.1", "::1", "localhost")):
        raise ValueError(f"{path}: jwks: expected an https URL or a path, since anyone who can change the keys can sign tokens")


def _beside(path: str, jwks: str) -> str:
    return str(Path(path).parent / jwks)


Keys = Mapping[str | None, jwt.PyJWK]


def read_keys(path: str) -> Keys:
    """Raises:
    OSError: the file cannot be read.
    ValueError: it is not a JSON Web Key Set.
    """
    return _parse_keys(path, Path(path).read_bytes())


def _parse_keys(source: str, text: bytes) -> Keys:
    try:
        keys = jwt.PyJWKSet.from_json(text.decode()).keys
    except (jwt.PyJWTError, AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{source}: expected a JSON Web Key Set") from None
    return {key.key_id: key for key in keys if key.key_type != "oct"}


class _FetchedKeys:
    """Keys at a URL, fetched again periodically."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._next_fetch = self._earliest_fetch = time.monotonic()
        self._fetching = asyncio.Lock()
        self.value: Keys | None = None

    async def has_changed(self, *, is_forced: bool = False) -> bool:
        """Fetch them if they are due, or if ``is_forced`` and `KEYS_RETRY_S` have passed; True if they were fetched."""
        async with self._fetching:
            now = time.monotonic()
            if now < (self._earliest_fetch if is_forced else self._next_fetch):
                return False
            self._next_fetch = self._earliest_fetch = now + KEYS_RETRY_S
            try:
                keys = _parse_keys(self._url, await asyncio.to_thread(self._fetch))
            except (OSError, ValueError) as error:
                # The previous keys stay in use; the next attempt follows within seconds.
                structlog.get_logger().warning("token keys not fetched", url=self._url, reason=str(error))
                return False
            self._next_fetch = now + KEYS_INTERVAL_S
            self.value = keys
            return True

    def _fetch(self) -> bytes:
        with urllib.request.urlopen(self._url, timeout=FETCH_TIMEOUT_S) as answer:  # noqa: S310 - the scheme is checked
            text: bytes = answer.read(MAX_KEYS_BYTES)
        return text


class BearerAuthenticator:
    """An `Authenticator` by bearer tokens. Kept up to date by `refresh`.

    Args:
        path: of the authorization file.

    Raises:
        OSError, ValueError: it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._policy = Watched([path], lambda: read_policy(path))
        self._keys_file: Watched[Keys] | None = None
        self._keys_url: _FetchedKeys | None = None
        self._remembered: dict[bytes, tuple[Caller, float]] = {}
        self._take_policy()

    async def refresh(self) -> None:
        """Read the file again if it has changed, and the keys if they are due."""
        if self._policy.has_changed():
            self._take_policy()
            # The authorization file has changed and is in force.
            structlog.get_logger().info("authorization file read")
        if self._keys_file and self._keys_file.has_changed():
            self._remembered.clear()
        if self._keys_url and await self._keys_url.has_changed():
            self._remembered.clear()

    def models_of(self, name: str) -> Sequence[str] | None:
        """The models that a caller with this name may call now, by its token; None: it may have been one with a JWT.

        A name that no token has any more may call nothing.
        """
        policy = self._policy.value
        found = [token.models for token in policy.tokens if token.name == name]
        if not found and policy.jwt is not None:
            return None
        return [pattern for models in found for pattern in models]

    def _take_policy(self) -> None:
        self._remembered.clear()
        self._keys_file, self._keys_url = None, None
        if issuer := self._policy.value.jwt:
            if "://" in issuer.jwks:
                self._keys_url = _FetchedKeys(issuer.jwks)
            else:
                path = _beside(self._path, issuer.jwks)
                self._keys_file = Watched([path], lambda: read_keys(path))

    def recognise(self, credentials: Sequence[str]) -> Caller | None:
        """A listed token, or a JWT that was verified within `REMEMBERED_S`. See `splitserve.server.callers`."""
        digest = _digest(_token(credentials))
        remembered = self._remembered.get(digest)
        if remembered and time.monotonic() < remembered[1]:
            return remembered[0]
        if listed := self._listed(digest):
            return listed
        if self._policy.value.jwt is None:
            raise Unauthenticated(WRONG_CREDENTIALS)
        return None

    async def identify(self, credentials: Sequence[str]) -> Caller:
        """Verify a JWT, for which its issuer's keys may have to be fetched."""
        token = _token(credentials)
        issuer = self._policy.value.jwt
        if issuer is None:
            raise Unauthenticated(WRONG_CREDENTIALS)
        return await self._signed(issuer, token, _digest(token))

    def _listed(self, digest: bytes) -> Caller | None:
        """Compares with every listed token in constant time, so that timing reveals nothing about them."""
        text, found = digest.hex(), None
        for token in self._policy.value.tokens:
            if hmac.compare_digest(token.sha256, text):
                found = token
        return Caller(found.name, found.models, found.operator, owner=found.name) if found else None

    async def _signed(self, issuer: Issuer, token: str, digest: bytes) -> Caller:
        try:
            key = await self._key(jwt.get_unverified_header(token).get("kid"))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(issuer.algorithms),
                audience=issuer.audience,
                issuer=issuer.issuer,
                leeway=issuer.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, TypeError, ValueError):
            raise Unauthenticated(WRONG_CREDENTIALS) from None
        caller = _granted(issuer.grants, claims)
        if len(self._remembered) >= N_REMEMBERED:
            self._remembered.clear()
        left_s = claims["exp"] + issuer.leeway_s - time.time()
        self._remembered[digest] = (caller, time.monotonic() + min(left_s, REMEMBERED_S))
        return caller

    async def _key(self, key_id: str | None) -> jwt.PyJWK:
        keys = self._keys()
        if self._keys_url and (keys is None or key_id not in keys) and await self._keys_url.has_changed(is_forced=True):
            self._remembered.clear()
            keys = self._keys()
        if keys is None:
            raise Unavailable("the keys that verify tokens cannot be fetched")
        if key_id is None and len(keys) == 1:
            return next(iter(keys.values()))
        if key_id not in keys:
            raise Unauthenticated(WRONG_CREDENTIALS)
        return keys[key_id]

    def _keys(self) -> Keys | None:
        source = self._keys_file or self._keys_url
        return source.value if source else None


def _token(credentials: Sequence[str]) -> str:
    if not credentials:
        raise Unauthenticated(NO_CREDENTIALS)
    scheme, _, token = credentials[0].partition(" ")
    token = token.strip()
    if len(credentials) > 1 or scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_LENGTH:
        raise Unauthenticated(WRONG_CREDENTIALS)
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _granted(grants: Sequence[Grant], claims: Mapping[str, Any]) -> Caller:
    """The union of the matching grants."""
    matching = [grant for grant in grants if all(_matches(claims, *claim) for claim in grant.claims.items())]
    models = tuple(pattern for grant in matching for pattern in grant.models)
    subject = str(claims.get("sub") or "")
    return Caller(subject[:64] or "jwt", models, any(grant.operator for grant in matching), owner=_owner(subject))


def _owner(subject: str) -> str:
    """Whom jobs of a JWT's subject belong to: no listed token, which may have the same name; "" without a subject."""
    if not subject:
        return ""
    if len(subject) > MAX_SUBJECT_LENGTH or not subject.isprintable():
        return f"jwt:sha256:{hashlib.sha256(subject.encode(errors='surrogatepass')).hexdigest()}"
    return f"jwt:{subject}"


def _matches(claims: Mapping[str, Any], name: str, pattern: str) -> bool:
    value = claims.get(name)
    if name in ("scope", "scp") and isinstance(value, str):
        value = value.split()
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, str) and fnmatchcase(each, pattern) for each in values)
