"""llama-server as serve.sh calls it: llama.cpp's own server out of xllamacpp, which has no program of that name."""

from __future__ import annotations

import argparse
import os
import sys
import threading

import xllamacpp

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("-m", required=True)
parser.add_argument("--jinja", action="store_true")
parser.add_argument("--alias", required=True)
parser.add_argument("--host", required=True)
parser.add_argument("--port", type=int, required=True)
args = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.use_jinja, params.hostnames, params.port = args.m, args.jinja, [args.host], args.port
params.model_alias = {args.alias}
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup, params.verbosity = 1024, 1, 1, False, -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait(float(os.environ.get("SECONDS_TO_LIVE", "120")))
sys.stdout.flush()
os._exit(0)
