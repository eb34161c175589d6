# SPDX-License-Identifier: Apache-2.0 OR MIT
# Two console devices: con0 is hvc0 with a login shell, con1 is hvc1 with a named port.

mkdir -p /dev/virtio-ports
# As udev does it.
named_port() {
    for port in /sys/class/virtio-ports/vport*; do
        [ "$(cat $port/name 2> /dev/null)" = "$1" ] || continue
        ln -sf "/dev/${port##*/}" "/dev/virtio-ports/$1"
        return 0
    done
    return 1
}

# The size of terminal $1 is $2.
size_is() { [ "$(stty -F "$1" size)" = "$2" ]; }

# The same, at last.
sized() { await 10 size_is "$1" "$2" || { stty -F "$1" size; return 1; }; }

await 20 test -c /dev/hvc0 || fail "there is no hvc0: $(ls /dev/hvc*)"
await 20 test -c /dev/hvc1 || fail "there is no hvc1: $(ls /dev/hvc*)"
await 20 named_port agent || fail "there is no port agent: $(grep . /sys/class/virtio-ports/*/name)"
check kernel-console grep -q hvc0 /sys/class/tty/console/active
echo "<0>said by the kernel" > /dev/kmsg
while :; do getty -n -l /bin/sh -L 0 hvc0 vt100; done &
shell=$!
mark shell
read -r answer

# Sizes.
exec 5< /dev/hvc1
mark size
read -r answer
check size-by-configuration sized /dev/hvc0 "45 123"
check size-by-message sized /dev/hvc1 "33 111"

# The named port, both ways: what was typed before it was opened has waited.
exec 4<> /dev/virtio-ports/agent
read -r line <&4
echo "heard: $line" >&4
check early-words test "$line" = "said before anybody listened"
mark agent
read -r answer

# A megabyte.
stty -F /dev/hvc1 raw -echo
seq -w 1 150000 | head -c 1048576 > /tmp/lines
mark flood "$(sha256sum < /tmp/lines | cut -d ' ' -f 1)"
check flood cp /tmp/lines /dev/hvc1
mark flooded
read -r answer

# Another, while the device host is killed.
mark kill
check flood-over-kill cp /tmp/lines /dev/hvc1
mark survived
read -r answer

# The port is still open; what it hears comes from another process.
read -r line <&4
echo "heard: $line" >&4
check port-after-kill test "$line" = "said after the kill"
mark again
read -r answer
kill $shell
