-- wrk ... -s wrk.lua URL -- FILE: post FILE over and over, and print the result as JSON.

function init(args)
    wrk.method, wrk.body = "POST", io.open(args[1], "rb"):read("*a")
    wrk.headers["Content-Type"] = "application/json"
end

function done(summary, latency)
    local e = summary.errors
    print(string.format('\n{"count": %d, "seconds": %f, "failed": %d, "p50": %f, "p99": %f}',
        summary.requests, summary.duration / 1e6,
        e.connect + e.read + e.write + e.timeout + e.status,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
