#!/bin/sh
# Checks a proxy from outside: one line per check, then `ok`; a clear line and a non-zero exit code at the first failure.
#
#   ./smoke.sh              starts `llm_proxy.py --demo` on a free port of loopback, checks it, and stops it
#   ./smoke.sh URL [KEY]    checks a running proxy, say http://127.0.0.1:8899; KEY may also stand in API_KEY
#   ./smoke.sh PART         shows one thing on a demo of its own: quota, rate, shed, timeout, redact or stream;
#                           without arguments all of them follow the checks
#
# On a running proxy this makes real calls, 22 at most: they count against the bucket of KEY, or of this address.
# MODEL names the model to ask for (the first that /v1/models lists); PYTHON the interpreter (python3).
# It needs sh, curl and python3.
set -eu

python=${PYTHON:-python3}
parts="quota rate shed timeout redact stream"
url=${1:-} key=${2:-${API_KEY:-}}
part=
case " $parts " in *" ${url:--} "*) part=$url url= ;; esac
url=${url%/} url=${url%/v1}
most_calls=20
demo=
spy=
NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"
export NO_PROXY
unset no_proxy
here=$(cd -- "$(dirname -- "$0")" && pwd)

say() { printf '%s\n' "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }

case $url in
    "" | *[.:]* | localhost) ;;
    *) fail "there is no part $url, and no such URL; the parts are: $parts" ;;
esac
for tool in curl "$python"; do
    command -v "$tool" >/dev/null || fail "$tool is not installed"
done

dir=$(mktemp -d)
stop_demo() {
    if [ -n "$demo" ]; then
        kill "$demo" 2>/dev/null || :
        wait "$demo" 2>/dev/null || :
    fi
    demo=
}
finish() {
    code=$?
    trap - EXIT
    stop_demo
    [ $code != 1 ] || [ ! -f "$dir/log" ] || sed 's/^/proxy: /' "$dir/log" >&2
    rm -rf "$dir"
    exit $code
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# request CREDENTIAL PATH [BODY]: leaves status, head and body in $dir.
request() {
    credential=$1 path=$2
    shift 2
    if [ $# -gt 0 ]; then
        printf %s "$1" >"$dir/sent"
        set -- -H 'Content-Type: application/json' --data-binary "@$dir/sent"
    fi
    [ -z "$credential" ] || set -- "$@" -H "Authorization: Bearer $credential"
    curl -q -sS -N --max-time 120 -D "$dir/head" -o "$dir/body" -w '%{http_code}' "$@" "$url$path" >"$dir/status" 2>"$dir/error" ||
        fail "$path: $(cat "$dir/error")"
}

# judge WHAT: looks at the last answer, prints what it found; exit code 0 as it should be, 1 wrong, 3 limited, 4 key asked for.
judge_py=$dir/judge.py
cat >"$judge_py" <<'PYTHON'
import json, sys

def read(name):
    with open(sys.argv[2] + "/" + name, encoding="utf-8", newline="") as file:
        return file.read()

def head(name):
    lines = [line.partition(":") for line in read("head").splitlines()]
    return ([value.strip() for key, _, value in lines if key.lower() == name.lower()] or [""])[-1]

def need(truth, what):
    if not truth:
        print("%s (status %d: %s)" % (what, status, body[:300].strip()))
        sys.exit(1)

def events():
    need(head("content-type").startswith("text/event-stream"), "no event stream")
    found = [event[5:].strip() for event in body.replace("\r\n", "\n").split("\n\n") if event.startswith("data:")]
    need(found[-1:] == ["[DONE]"], "the stream does not end with [DONE]")
    return [json.loads(event) for event in found[:-1]]

def streamed(chunks):
    need(chunks and all(chunk["object"] == "chat.completion.chunk" for chunk in chunks), "no chat.completion.chunk")
    need(any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]), "no finish_reason")
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

def answer():
    need(head("x-ratelimit-remaining") or not left, "no X-RateLimit-Remaining")
    message = json.loads(body)["choices"][0]["message"]
    need(message["role"] == "assistant", "no assistant")
    return "%d characters" % len(message.get("content") or "")

def stream():
    chunks = events()
    return "%d events, %d characters" % (len(chunks), len(streamed(chunks)))

def told():
    found = json.loads(body)
    return "%d %s" % (status, found["error"]["message"] if "error" in found else found["choices"][0]["message"]["content"])

def limit():
    need(limited, "not limited")
    need(head("x-ratelimit-remaining"), "no X-RateLimit-Remaining")
    if status == 429:  # LIMIT_REPLY is error, or auto
        return json.loads(body)["error"]["message"]
    choice = json.loads(body)["choices"][0]
    need(choice["finish_reason"] == "stop" and choice["message"]["content"], "no message")
    return choice["message"]["content"]

def limit_stream():
    need(limited, "not limited")
    return streamed(events()) + ", streamed"

def unauthorized():
    need(status in (401, 429), "a call without a valid key is let in")
    code = json.loads(body)["error"]["code"]
    need(code in ("invalid_api_key", "too_many_wrong_keys"), "no invalid_api_key")
    return code

def health():
    need(status == 200 and json.loads(body)["ok"] is True, "not ok")
    quota = json.loads(body).get("quota")
    if not quota:
        return "no rule counts for this caller"
    return "%s of %s left" % (quota["remaining"], quota["limit"])

def remaining():
    quota = json.loads(body).get("quota")
    return int(float(quota["remaining"])) if quota else ""

def models():
    names = [row["id"] for row in json.loads(body)["data"]]
    need(names, "an empty list")
    return ", ".join(names[:5]) + (" ..." if names[5:] else "")

def first_model():
    return json.dumps(json.loads(body)["data"][0]["id"])

what, left, status, body = sys.argv[1], sys.argv[3], int(read("status")), read("body")
limited = '"chatcmpl-limit-' in body if status == 200 else status == 429 and bool(head("x-ratelimit-remaining"))
if status == 401 and "proxy API key" in body and what != "unauthorized":
    print("the proxy asks for a key: give it as second argument or in API_KEY")
    sys.exit(4)
if limited and what in ("answer", "stream"):
    sys.exit(3)
try:
    if what not in ("unauthorized", "health", "told"):
        need(status == 200 or limited, "no answer")
    print(globals()[what]())
except (ValueError, LookupError, TypeError, AttributeError) as fault:
    need(False, "not what it should be: %r" % fault)
PYTHON
judge() { "$python" "$judge_py" "$1" "$dir" "${left-}"; }

# check NAME WHAT: one line, or the end.
check() {
    found=$(judge "$2") || fail "$1: $found"
    say "$1: $found"
}

# check_call NAME WHAT BODY: as above; a caller who has nothing left is no failure of a running proxy.
check_call() {
    request "$key" /v1/chat/completions "$3"
    code=0
    found=$(judge "$2") || code=$?
    case $code in
        0) say "$1: $found" ;;
        3) [ -z "$demo" ] || fail "$1: limited too early"; say "$1: skipped, this caller's limit is reached already" ;;
        *) fail "$1: $found" ;;
    esac
}

# look: how much this caller has left, into $left; empty where no rule counts for it.
look() {
    request "$key" /health
    left=$(judge remaining)
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start_demo SETTING=VALUE ...: an environment of its own, in a directory without .env: settings that stand elsewhere do
# not reach it.
start_demo() {
    starts=0
    until start_on_free_port "$@"; do  # somebody else may have taken the port meanwhile
        starts=$((starts + 1))
        [ $starts -lt 3 ] && grep -q "cannot listen" "$dir/log" || fail "llm_proxy.py --demo did not start"
    done
}
start_on_free_port() {
    stop_demo
    port=$(free_port)
    url=http://127.0.0.1:$port key=smoke-key
    interpreter=$("$python" -c 'import sys; print(sys.executable)')
    cd "$dir"
    env -i PATH="$PATH" HOST=127.0.0.1 PORT="$port" PROXY_API_KEYS="smoke=$key" "$@" \
        "$interpreter" ${spy:+-c "$spy"} "$here/llm_proxy.py" --demo >"$dir/log" 2>&1 &
    demo=$!
    tries=0
    until grep -q " listens on $url" "$dir/log"; do  # somebody else may answer there
        kill -0 "$demo" 2>/dev/null || return 1
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "llm_proxy.py --demo is not ready after 30 s"
        nap 0.1
    done
}
nap() { sleep "$1" 2>/dev/null || sleep 1; }

# ask TEXT: the body of a call.
ask() { "$python" -c 'import json, sys
print(json.dumps({"model": "demo", "messages": [{"role": "user", "content": sys.argv[1]}]}))' "$1"; }

# expect NAME PATTERN BODY: a call whose answer, its status and text, must look like this.
expect() {
    request "$key" /v1/chat/completions "$3"
    found=$(judge told) || fail "$1: $found"
    say "$1: $found"
    case $found in $2) ;; *) fail "$1: that should be $2" ;; esac
}

part_quota() {
    start_demo MAX_TOKENS=2
    expect "quota of 2, call 1" "200 one" "$(ask "say: one")"
    expect "quota of 2, call 2" "200 two" "$(ask "say: two")"
    expect "quota of 2, call 3" "200 limit reached*" "$(ask "say: three")"
}

part_rate() {
    start_demo LIMITS="each 1 requests per 5s" LIMIT_REPLY=error
    one=$(ask "say: one") two=$(ask "say: two")  # before the 5 seconds begin
    expect "1 in 5 seconds, call 1" "200 one" "$one"
    expect "1 in 5 seconds, call 2" "429 *" "$two"
    sleep 5
    expect "1 in 5 seconds, 5 seconds later" "200 three" "$(ask "say: three")"
}

part_shed() {
    start_demo MAX_TOKENS=100 MAX_CONCURRENCY=1 MAX_QUEUE=1 DEMO_FIRST_MS=3000
    pids= body=$(ask "say: my turn")  # made before: a busy machine takes its time for it
    for number in 1 2 3; do
        ( dir=$dir/$number; mkdir "$dir"; request "$key" /v1/chat/completions "$body"
          judge told >"$dir/told" ) &
        pids="$pids $!"
    done
    for one in $pids; do wait "$one"; done
    cat "$dir/1/told" "$dir/2/told" "$dir/3/told" | sort | sed 's/^/3 calls at once, 1 runs and 1 waits: /'
    [ "$(grep -c "^200 my turn" "$dir"/[123]/told | grep -c ":1")" = 2 ] || fail "shed: that should be 2 answers"
    rm -rf "$dir"/[123]
}

part_timeout() {
    start_demo DEMO_FIRST_MS=5000 FIRST_BYTE_TIMEOUT=0.5
    expect "no first byte in half a second" "504 *" "$(ask "say: too late")"
}

# The demo as it is, but for a file that has what it was told to say.
seen='
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import llm_proxy
words_for = llm_proxy.Demo.words_for
def seen_words(demo, call):
    with open("seen", "w") as file:
        file.write("".join(words_for(demo, call)))
    return words_for(demo, call)
llm_proxy.Demo.words_for = seen_words
sys.exit(llm_proxy.main(["--demo"]))'

part_redact() {
    told="ann@example.com pays by 4111 1111 1111 1111"
    spy=$seen
    start_demo MAX_TOKENS=100 REDACT=email,card REDACT_UPSTREAMS='*'
    expect "redact, what came back" "200 $told" "$(ask "say: $told")"
    say "redact, what was sent: $(cat "$dir/seen")"
    [ "$(cat "$dir/seen")" = "[[EMAIL_1]] pays by [[CARD_1]]" ] || fail "redact: that should be placeholders"
    spy=
    start_demo MAX_TOKENS=100 REDACT=email REDACT_UPSTREAMS='*' REDACT_MODE=block
    expect "redact, where it is refused" "400 *must not leave*" "$(ask "say: $told")"
}

part_stream() {
    start_demo MAX_TOKENS=100
    printf %s "$(ask "say: word by word as they come from the model, one by one" | sed 's/}$/, "stream": true}/')" >"$dir/sent"
    "$python" -c '
import json, subprocess, sys, time
call = subprocess.Popen(["curl", "-q", "-sSN", *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
began, times = time.time(), []
for line in iter(call.stdout.readline, ""):
    event = line[5:].strip() if line.startswith("data:") else "[DONE]"
    word = "" if event == "[DONE]" else json.loads(event)["choices"][0]["delta"].get("content")
    if word:
        times.append(time.time() - began)
        print("stream: after %.2f s: %s" % (times[-1], word))
sys.exit(len(times) != 12 or times[-1] - times[0] < 0.1)' -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
        --data-binary "@$dir/sent" "$url/v1/chat/completions" || fail "stream: that should be twelve words, one after another"
}

show() {
    for one in "$@"; do "part_$one"; done
    say ok
}

if [ -n "$part" ]; then
    show "$part"
    exit
fi
whole=
if [ -z "$url" ]; then
    whole=1
    start_demo MAX_TOKENS=4
fi
# end: what follows when a proxy was checked.
end() {
    if [ -n "$whole" ]; then
        # shellcheck disable=SC2086
        show $parts
    else
        say ok
    fi
    exit
}

request "$key" /health
check health health
request "$key" /v1/models
check models models
model=$(judge first_model)
[ -z "${MODEL:-}" ] || model=$("$python" -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$MODEL")

request "" /v1/models
code=0
found=$(judge models) || code=$?
if [ $code = 4 ] || [ -n "$demo" ]; then
    check "401 without a key" unauthorized
    request "$key-but-wrong" /v1/models
    check "401 with a wrong key" unauthorized
else
    say "401: skipped, this proxy asks for no key"
fi

call='{"model":'$model',"messages":[{"role":"user","content":"Say hello."}],"max_tokens":16'
look
before=$left
check_call answer answer "$call}"
look
cost=$((${before:-0} - ${left:-0}))
check_call stream stream "$call,\"stream\":true}"

look
if [ -z "$left" ]; then
    say "limit reply: skipped, no rule counts for this caller"
    end
fi
if [ "$cost" -gt 0 ] && [ "$left" -ge $((most_calls * cost)) ]; then
    say "limit reply: skipped, $left tokens are left and a call costs $cost: more than $most_calls calls to go"
    end
fi
calls=0
while :; do
    request "$key" /v1/chat/completions "$call}"
    code=0
    found=$(judge answer) || code=$?
    [ $code = 0 ] || break
    calls=$((calls + 1))
    if [ $calls -ge $most_calls ]; then
        say "limit reply: skipped, not reached after $calls more calls"
        end
    fi
done
[ $code = 3 ] || fail "limit reply: $found"
check "limit reply" limit
if [ -n "$demo" ]; then
    request "$key" /v1/chat/completions "$call,\"stream\":true}"
    check "limit reply" limit_stream
fi
end
