# SPDX-License-Identifier: Apache-2.0 OR MIT
# A machine that does what the host tells it: each line from the console is a command.

# said NAME: what comes in goes to the console, each line behind the name. In awk, so that a line is one write.
said() { awk -v name="$1" '{ print name "| " $0; fflush() }'; }

# start NAME COMMAND…: runs the command beside all else. Its process id is in /run/NAME. It reads the pipe /run/NAME.in, if there is one.
start() {
    name=$1; shift
    input=/dev/null
    [ ! -p "/run/$name.in" ] || input=/run/$name.in
    {
        # Open for both ways, so that it neither waits nor ends when nobody writes.
        "$@" 2>&1 <> "$input" &
        echo $! > "/run/$name.new"
        mv "/run/$name.new" "/run/$name"
        wait $!
        echo "ended with $?"
    } | said "$name" >&3 &
    await 5 [ -s "/run/$name" ]
}

# stop NAME SIGNAL: the process gets it, and has ended when this returns.
gone() { ! [ -e "/proc/$1" ]; }
stop() {
    kill "-$2" "$(cat "/run/$1")" && await 20 gone "$(cat "/run/$1")" && rm -f "/run/$1"
}

# The console, for those whose output goes elsewhere.
exec 3>&1
mkdir -p /run
ip link set lo up
mark obeys
number=0
while read -r line; do
    number=$((number + 1))
    eval "$line" > /tmp/told 2>&1
    code=$?
    said told < /tmp/told
    mark did $number $code
done
