"""A client that waits as long as it takes: how fast a server answers depends on what else the machine does."""

import httpx

http = httpx.Client(timeout=None, limits=httpx.Limits(max_keepalive_connections=0))
