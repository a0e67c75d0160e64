# Sourced by serve, test and check: brings a fresh machine to a working .venv. Works with bash 3.2 (macOS) and up.
# Nothing is done when the stamp in .venv fits pyproject.toml, this file and the place of the tree.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/.agentmem-setup
: "${HOME:=$(cd ~ && pwd)}"
export HOME

step() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
is_linux() { [ "$(uname -s)" = Linux ]; }
can_apt() { is_linux && [ "$(id -u)" = 0 ] && have apt-get; }

apt_install() {
  step "apt-get install $*"
  DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || true  # an old list may still do
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

is_good_python() {  # by running it: a name on PATH may be a wrapper for a version that is not installed
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {  # prints the first Python from 3.11 to 3.14
  local name
  for name in python3.13 python3.12 python3.11 python3 python python3.14; do
    if have "$name" && is_good_python "$name"; then command -v "$name"; return 0; fi
  done
  return 1
}

find_uv() {  # prints a uv: the machine's, or one installed beside the tree with whatever Python there is
  local uv=$ROOT/.venv-bootstrap/bin/uv
  if have uv; then command -v uv; return 0; fi
  if [ ! -x "$uv" ]; then
    have python3 || return 1
    step "Installing uv into .venv-bootstrap"
    python3 -m pip install --quiet --target "$ROOT/.venv-bootstrap" uv >&2 || return 1
  fi
  [ -x "$uv" ] && printf '%s\n' "$uv"
}

venv_with_uv() {  # $1: a Python, or a version that uv downloads
  local uv
  uv=$(find_uv) || return 1
  step "Creating .venv with uv ($1)"
  rm -rf "$VENV"
  "$uv" venv --quiet --seed --python "$1" "$VENV" >&2
}

venv_with() {  # $1: a Python. Debian's may lack venv or ensurepip
  step "Creating .venv with $1"
  rm -rf "$VENV"
  "$1" -m venv "$VENV" >/dev/null 2>&1 && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() {
  local python version
  if ! python=$(find_python); then
    step "No Python from 3.11 to 3.14 found"
    venv_with_uv 3.12 && return
    can_apt && apt_install python3 python3-venv && python=$(find_python) && venv_with "$python" && return
    die "install Python 3.12 (macOS: brew install python@3.12; Debian, Ubuntu: apt-get install python3.12-venv) or uv"
  fi
  venv_with "$python" && return
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if can_apt && { apt_install "python$version-venv" || apt_install python3-venv; } && venv_with "$python"; then return; fi
  venv_with_uv "$python" && return
  die "$python can't make a virtual environment: install the package python$version-venv (or uv), then run this again"
}

install_project() {
  step "Installing agentmem and its dependencies (about 300 MB on Linux, a few minutes the first time)"
  "$VENV/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' >&2  # for --group
  (cd "$ROOT" && "$VENV/bin/python" -m pip install --quiet --editable . --group dev >&2)
}

check_blas() {  # on Linux: the system's OpenBLAS, or a C compiler for the shim of the one from PyPI (linux_cpu/blas.py)
  is_linux || return 0
  if have cc || have gcc || have clang; then return 0; fi
  # no pipe into `grep -q`: with pipefail it can report the writer's SIGPIPE
  case $(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null) in *libopenblas.so*) return 0 ;; esac
  can_apt && apt_install libopenblas0-pthread && return 0
  step "warning: no fast BLAS, so prefill will be slow: install libopenblas0-pthread (Fedora: openblas) or a C compiler"
}

fingerprint() { cat "$ROOT/pyproject.toml" "$ROOT/scripts/setup.sh" - <<<"$ROOT" | cksum; }

setup() {
  local wanted start=$SECONDS
  wanted=$(fingerprint)
  if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then return 0; fi
  step "Setting up $VENV"
  [ "$(uname -sm)" != "Darwin x86_64" ] || die "MLX needs Apple silicon and a shell that is not under Rosetta"
  make_venv
  check_blas
  install_project
  printf '%s\n' "$wanted" >"$STAMP"
  step "Set up in $((SECONDS - start)) s"
}

setup_clients() {  # the clients of tests/clients, in an environment of their own: they hold each other's versions down
  local wanted uv clients=$ROOT/.venv-clients list=$ROOT/tests/clients/requirements.txt
  wanted=$(cksum "$list")
  if [ "$(cat "$clients/.agentmem-setup" 2>/dev/null)" = "$wanted" ]; then return 0; fi
  step "Installing the clients that tests/clients tries (about 1.5 GB; AGENTMEM_TEST_CLIENTS=0: not)"
  rm -rf "$clients"
  if uv=$(find_uv) && "$uv" venv --quiet --python "$VENV/bin/python" "$clients" >&2 &&
    "$uv" pip install --quiet --python "$clients/bin/python" --requirement "$list" >&2; then
    printf '%s\n' "$wanted" >"$clients/.agentmem-setup"
  else
    rm -rf "$clients"
    step "warning: they could not be installed, so their tests are skipped"
  fi
}

pull_demo() {  # $1: the home directory. What is there is checked by whoever loads it
  [ -f "$1/models/demo/model.safetensors" ] || "$VENV/bin/agentmem" pull demo --home "$1" >&2
}
