"""Which URLs and addresses results may go to."""

import ipaddress

import pytest

from modalkit.service.queue_backends import QueueNameError
from modalkit.service.queue_backends.webhook_urls import AllowedURLs, is_public, shown_queue_name

HOSTS = ["Hooks.Example.com", "*.wild.example", "ports.example:8443", "bücher.example", "8.8.8.8", "[2606:4700::1]:9"]
# fmt: off  # a line each would be forty
NOT_PUBLIC = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.255",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.2.3",
    "240.0.0.1",
    "255.255.255.255",
    "168.63.129.16",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]
# fmt: on


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/path?token=1",
        "HTTPS://HOOKS.EXAMPLE.COM",
        "https://hooks.example.com:443/",
        "https://a.wild.example/",
        "https://a.b.wild.example/",
        "https://ports.example:8443/",
        "https://bücher.example/ü",
        "https://xn--bcher-kva.example/",
        "https://8.8.8.8/",
        "https://[2606:4700:0:0::1]:9/",
    ],
)
def test_urls_of_allowed_hosts_are_accepted(url: str) -> None:
    AllowedURLs(HOSTS, allow_private_addresses=False).parse(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("results", "is no URL of a host"),
        ("", "is no URL of a host"),
        ("https://", "is no URL of a host"),
        ("https:///path", "is no URL of a host"),
        ("//hooks.example.com/", "must be an https URL"),
        ("http://hooks.example.com/", "must be an https URL"),
        ("ftp://hooks.example.com/", "must be an https URL"),
        ("https://user:password@hooks.example.com/", "no user name"),
        ("https://hooks.example.com\\@evil.example/", "no user name"),
        ("https://hooks.example.com@evil.example/", "no user name"),
        ("https://hooks.example.com#@evil.example:1/", None),
        ("https://evil.example/hooks.example.com", "not among the allowed"),
        ("https://hooks.example.com.evil.example/", "not among the allowed"),
        ("https://evilhooks.example.com/", "not among the allowed"),
        ("https://hooks.example.com:8443/", "not among the allowed"),
        ("https://hooks.example.com./", "is no URL of a host"),
        ("https://wild.example/", "not among the allowed"),
        ("https://.wild.example/", "is no URL of a host"),
        ("https://evilwild.example/", "not among the allowed"),
        ("https://ports.example/", "not among the allowed"),
        ("https://hooks.example.com:99999/", "not among the allowed|no URL"),
        ("https://hooks.exa mple.com/", "is no URL of a host"),
        ("https://hooks.example.com\n/", "is no URL of a host"),
        ("https://hooks%2eexample.com/", "is no URL of a host"),
        ("https://*.wild.example/", "is no URL of a host"),
        ("https://2130706433/", "is no URL of a host"),
        ("https://0x7f.0.0.1/", "is no URL of a host"),
        ("https://0x7f000001/", "is no URL of a host"),
        ("https://0177.0.0.1/", "is no URL of a host"),
        ("https://127.1/", "is no URL of a host"),
        ("https://a.wild.example.0x/", "is no URL of a host"),
        ("https://①②⑦.0.0.1/", "is no URL of a host"),
        ("https://8.8.4.4/", "not among the allowed"),
        ("https://[::ffff:8.8.8.8]/", "not among the allowed"),
        ("https://[2606:4700::1]/", "not among the allowed"),
    ],
)
def test_all_other_urls_are_refused(url: str, problem: str | None) -> None:
    allowed = AllowedURLs(HOSTS, allow_private_addresses=False)
    if problem is None:  # what follows # is no part of the host, and is not sent
        assert allowed.parse(url).host == "hooks.example.com"
        return
    with pytest.raises(QueueNameError, match=problem):
        allowed.parse(url)


def test_plain_http_and_private_addresses_are_for_ones_own_network() -> None:
    hosts = ["127.0.0.1", "::1", "localhost:8080"]
    allowed = AllowedURLs(hosts, allow_private_addresses=True)
    for url in ("http://127.0.0.1/", "https://127.0.0.1/", "http://[::1]/", "http://localhost:8080/"):
        allowed.parse(url)
    with pytest.raises(QueueNameError, match="no address of the public Internet"):
        AllowedURLs(hosts, allow_private_addresses=False).parse("https://127.0.0.1/")


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.", "https://a.example", "a.example/secret", "u@a.example", "a b", "a.example:x", "127.1", "a?secret"],
)
def test_what_is_no_host_cannot_be_allowed_and_is_not_shown(host: str) -> None:
    with pytest.raises(ValueError, match=r"^allowed_hosts\[1\] must be a host") as raised:
        AllowedURLs(["a.example", host], allow_private_addresses=False)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("hosts", [[], "hooks.example.com"])
def test_hosts_are_a_list_that_is_not_empty(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="must list at least one host"):
        AllowedURLs(hosts, allow_private_addresses=False)


@pytest.mark.parametrize(
    ("queue_name", "shown"),
    [
        ("results", "results"),
        ("https://u:pass@a.example:8443/secret?secret#secret", "https://a.example:8443"),
        ("https://a.example\x00/secret", "(a URL)"),
        ("a.example/secret", "(a URL)"),
        ("https:///secret", "(a URL)"),
    ],
)
def test_of_a_url_only_its_origin_is_shown(queue_name: str, shown: str) -> None:
    assert shown_queue_name(queue_name) == shown


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_all_other_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
