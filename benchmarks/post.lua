-- wrk: post the bodies in turn; print one line of JSON at the end.
-- Environment: BODIES, files separated by spaces; CONTENT_TYPE.

local requests, turn = {}, 0

function init()
  for path in os.getenv("BODIES"):gmatch("%S+") do
    local file = assert(io.open(path, "rb"))
    requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = os.getenv("CONTENT_TYPE")}, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format('{"rps": %.1f, "p50_ms": %.2f, "p99_ms": %.2f, "errors": %d}\n',
    summary.requests / (summary.duration / 1e6), latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, errors))
end
