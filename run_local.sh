#!/bin/sh
# Starts llm_proxy.py with a local setup. Every value below gives way to the environment, and arguments are passed on:
#
#   ./run_local.sh                          start
#   ./run_local.sh --check                  show what would be used, and ask the endpoint for its models
#   PORT=9000 BASE_MODEL= ./run_local.sh    another port; an empty value leaves it to llm_proxy.py's default
#
# PYTHON names the interpreter (python3). All settings: ./run_local.sh --help
set -eu

export HOST="${HOST-127.0.0.1}"
export PORT="${PORT-8899}"
export BASE_API_URL="${BASE_API_URL-http://192.168.0.124:8888/v1}"
export BASE_API_KEY="${BASE_API_KEY-1mmer}"
export BASE_MODEL="${BASE_MODEL-gemma4}"
export MAX_TOKENS="${MAX_TOKENS-3}"
export REFILL_TOKENS="${REFILL_TOKENS-1}"
export REFILL_INTERVAL_SECONDS="${REFILL_INTERVAL_SECONDS-300}"

exec "${PYTHON:-python3}" "$(dirname -- "$0")/llm_proxy.py" "$@"
