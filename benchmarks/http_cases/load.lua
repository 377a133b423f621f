-- What wrk asks for when ../http.py runs it, and its figures as one line of JSON.
-- After `--`: nothing, to GET the URL; or content, a Cookie, and the targets to POST the content to, one after the other.

function init(words)
    if #words > 0 then
        local requests, turn = {}, 0
        wrk.method, wrk.body = "POST", words[1]
        wrk.headers["Content-Type"], wrk.headers["Cookie"] = "application/json", words[2]
        for number = 3, #words do
            requests[number - 2] = wrk.format(nil, words[number])
        end
        request = function()                    -- without it wrk sends the same bytes again and again, and does not come here
            turn = turn % #requests + 1
            return requests[turn]
        end
    end
end

function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format('{"operations": %d, "seconds": %.6f, "p50": %.9f, "p99": %.9f, "max": %.9f, '
            .. '"errors": {"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
        summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6, latency.max / 1e6,
        errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
