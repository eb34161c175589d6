# SPDX-License-Identifier: Apache-2.0 OR MIT
# What can be done with a network and an entropy device, as functions.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
device=$(readlink -f /sys/class/net/eth1/device)
virtio=${device##*/}
host=http://10.0.2.2:$PORT

is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
holds() { case $1 in *$2*) ;; *) echo "$1 without $2"; return 1 ;; esac; }
not() { ! "$@"; }
# The bits as the kernel prints them, bit 0 first.
feature() { is "$(cut -c $(($2 + 1)) "$1/features")" 1; }
fetch() { wget -q -O "$1" "$host/file" && is "$(sha256sum < "$1")" "$SUM  -"; }
# As text: busybox's wget sends no NUL.
upload() {
    head -c "$1" /tmp/file | base64 > /tmp/up || return 1
    is "$(wget -q -O - --post-file=/tmp/up "$host/sum")" "$(sha256sum < /tmp/up | cut -c 1-64)"
}
fetch_many() {
    for n in 1 2 3 4; do
        wget -q -O - "$host/file" | sha256sum > /tmp/sum$n &
    done
    wait
    for n in 1 2 3 4; do
        is "$(cat /tmp/sum$n)" "$SUM  -" || return 1
    done
}
fetch_udp() { tftp -g -r file -l /tmp/udp 10.0.2.2 "$UDP_PORT" && is "$(sha256sum < /tmp/udp)" "$UDP_SUM  -"; }
refused() { holds "$(timeout 20 wget -q -O - http://10.0.2.2:1/ 2>&1)" refused; }
# Bytes of the entropy device: as many as asked for, and not the same twice.
random() {
    dd if=/dev/hwrng of=/tmp/r1 bs=64 count="$1" 2> /dev/null && dd if=/dev/hwrng of=/tmp/r2 bs=64 count="$1" 2> /dev/null
    is "$(wc -c < /tmp/r1)" $((64 * $1)) && is "$(wc -c < /tmp/r2)" $((64 * $1)) && not cmp -s /tmp/r1 /tmp/r2
}
again() {
    echo "$virtio" > /sys/bus/virtio/drivers/virtio_net/unbind && await 10 test ! -e /sys/class/net/eth1 &&
        echo "$virtio" > /sys/bus/virtio/drivers/virtio_net/bind && name_nic "$TEST_MAC" eth1 &&
        lease eth1 && ping -q -c 3 -i 0.1 10.0.2.2
}
rng_again() {
    rng=$(basename "$(ls -d /sys/bus/virtio/drivers/virtio_rng/virtio*)")
    echo "$rng" > /sys/bus/virtio/drivers/virtio_rng/unbind && echo "$rng" > /sys/bus/virtio/drivers/virtio_rng/bind &&
        await 10 grep -q virtio_rng /sys/class/misc/hw_random/rng_current && random 4
}
down_and_up() {
    ip link set eth1 down && lease eth1 && ping -q -c 3 -i 0.1 10.0.2.2
}
clean_log() {
    said=$(dmesg | grep -E 'BUG:|WARNING:|Call Trace|Oops|timed out|virtio.*([Ff]ail|[Ee]rror)|is not a head|id .* out of range')
    [ -z "$said" ] || { echo "$said"; return 1; }
}
