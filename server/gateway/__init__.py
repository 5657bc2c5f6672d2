"""The gateway: a reverse proxy with client certificates before a loopback SuperLink. Read proxy.py first."""
