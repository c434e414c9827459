# What there is to do here: `just` lists it. Every recipe is one script, which can be called without `just` as well; its
# head says more. `just RECIPE ARGUMENTS` hands its arguments on.

[private]
list:
    @just --list --unsorted

# from a fresh clone to the first manifest: .venv, installation, the quickstart job
quickstart *arguments:
    scripts/quickstart.sh {{arguments}}

# install the test extra and run the whole test suite; arguments are pytest's
test *arguments:
    scripts/test.sh {{arguments}}

# the tests of the files that take at most 0.6 s of processor time each: a minute in all
test-quick *arguments:
    scripts/test.sh --quick {{arguments}}

# lint, format, types and import rules, in seconds
check:
    scripts/check.sh

# put the C++ kernels into the style of .clang-format
format-cpp:
    .venv/bin/clang-format -i cpp/*/*.cpp cpp/*/*.hpp cpp/include/layerlens/*.hpp

# write docs/configuration.md and docs/cli.md from the code
generate-docs *arguments:
    .venv/bin/python scripts/generate_docs.py {{arguments}}

# build the documentation site into build/site; a warning is an error
docs *arguments:
    scripts/build_docs.sh {{arguments}}

# the kernels' regression gate: their ratios to NumPy, torch and numba beside the stored ones
benchmark *arguments:
    scripts/benchmark.sh {{arguments}}

# tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize *arguments:
    scripts/sanitize.sh {{arguments}}

# schemathesis tries every operation of a real server
check-api *arguments:
    scripts/check_api.sh {{arguments}}

# write every export and load it in the tool it is for
check-exports *tools:
    scripts/check_exports.sh {{tools}}

# the picture in the README, from the quickstart's manifest
readme-picture *arguments:
    .venv/bin/python scripts/readme_picture.py {{arguments}}

# the table of serving engines in docs/how-to/my-server.md, with what the engines' own wheels say
serving-table *arguments:
    .venv/bin/python scripts/serving_table.py {{arguments}}

# telemetry and tracking against real servers: MLflow, Prometheus, its push gateway
check-monitoring *arguments:
    scripts/check_monitoring.sh {{arguments}}

# compile, validate and run the examples of orchestrators and schedulers with the real SDKs
check-orchestrators *names:
    scripts/check_orchestrators.sh {{names}}

# open a report in headless Chromium: console, requests, phone, accessibility, keyboard, print
check-report *arguments:
    scripts/check_report.sh {{arguments}}

# build dist/: an sdist and a wheel for every Python 3.10 to 3.13 found
wheels:
    scripts/build_wheels.sh

# install the wheel of dist/ where nothing else is, and run it there
check-wheel *arguments:
    scripts/check_wheel.sh {{arguments}}

# build sdist and wheel twice, in two folders, and compare every byte
check-reproducible:
    scripts/check_reproducible.sh

# software bill of materials (CycloneDX) of what installing the built wheel brings
sbom output:
    scripts/make_sbom.sh {{output}}

# write and sign SHA256SUMS of a release directory, with an SSH key
sign-release directory key:
    scripts/sign_release.sh {{directory}} {{key}}

# check the signature of a downloaded release, every checksum, and that no file stands beside them
verify-release directory signers *signer:
    scripts/verify_release.sh {{directory}} {{signers}} {{signer}}
