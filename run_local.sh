#!/bin/sh
# Starts llm_proxy.py for this machine alone, in front of an endpoint on it, with a small bucket that is soon empty.
# Every value below gives way to the environment, but not to .env; arguments are passed on:
#
#   ./run_local.sh                                          start, in front of vLLM
#   ./run_local.sh --check                                  show what would be used, and ask the endpoint for its models
#   PORT=9000 BASE_API_URL=http://gpu:8080/v1 ./run_local.sh    another port, another endpoint
#   MAX_TOKENS= ./run_local.sh                              an empty value leaves it to llm_proxy.py's default
#
# PYTHON names the interpreter (python3). All settings: ./run_local.sh --help
set -eu

export HOST="${HOST-127.0.0.1}"
export PORT="${PORT-8899}"
export BASE_API_URL="${BASE_API_URL-http://127.0.0.1:8000/v1}"
export MAX_TOKENS="${MAX_TOKENS-3}"
export REFILL_TOKENS="${REFILL_TOKENS-1}"
export REFILL_INTERVAL_SECONDS="${REFILL_INTERVAL_SECONDS-300}"

exec "${PYTHON:-python3}" "$(dirname -- "$0")/llm_proxy.py" "$@"
