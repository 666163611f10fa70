"""The HTTP application: pictures in, calibrated answers out.

Arrows point down: `app` → `api` → `inference` → `errors`, `telemetry`, and of training only `bundle`, `events` and
`devices`.
"""
