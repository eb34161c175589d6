# SPDX-License-Identifier: Apache-2.0 OR MIT
# Network and entropy device as PCI functions, with exercises.sh. Settings: INTERRUPTS (MSI, INTx), IOMMU (yes, no),
# REBINDS and REQUESTS (how many).
function=$(basename "${device%/*}")
rng_virtio=$(basename "$(ls -d /sys/bus/virtio/drivers/virtio_rng/virtio*)")
rng_device=$(readlink -f "/sys/bus/virtio/devices/$rng_virtio")
rng_function=$(basename "${rng_device%/*}")

# What lspci sees goes to the host, which knows what there ought to be.
list() { lspci -D -nvv -s "$2" | sed "s/^/LSPCI $1 /"; }
# interrupts VIRTIO: how many of this device, by all processors.
interrupts() {
    awk -v name="$1" -v cpus="$(grep -c ^processor /proc/cpuinfo)" '
        { for (n = 2; n <= NF; n++) if (n > cpus + 1 && ($n == name || index($n, name "-") == 1 || $n == name ",")) {
            for (cpu = 2; cpu <= cpus + 1; cpu++) sum += $cpu; next } }
        END { print sum + 0 }' /proc/interrupts
}
kind_of_interrupt() {
    lines=$(grep "$1\(-\|,\|\$\)" /proc/interrupts)
    case "$INTERRUPTS $lines" in MSI*$1*) holds "$lines" MSI ;; INTx*$1*) not holds "$lines" MSI ;; *) echo "$lines"; return 1 ;; esac
}
# Each request is answered with 64 bytes, and by an interrupt of its own.
many_requests() {
    before=$(interrupts "$rng_virtio")
    is "$(dd if=/dev/hwrng bs=64 count="$REQUESTS" 2> /dev/null | wc -c)" $((64 * REQUESTS)) || return 1
    count=$(($(interrupts "$rng_virtio") - before))
    [ $count -ge "$REQUESTS" ] || { echo "$count interrupts"; return 1; }
}
rebind_net() {
    echo "$virtio" > /sys/bus/virtio/drivers/virtio_net/unbind && [ ! -e /sys/class/net/eth1 ] &&
        echo "$virtio" > /sys/bus/virtio/drivers/virtio_net/bind && name_nic "$TEST_MAC" eth1 &&
        ip link set eth1 up && ip addr add 10.0.2.15/24 dev eth1 && ping -q -c 1 10.0.2.2
}
rebinds() {
    for n in $(seq "$REBINDS"); do
        rebind_net && rng_again || { echo "time $n"; return 1; }
    done
}
# Behind an IOMMU, and only what is mapped can be reached.
translated() {
    group=$(readlink -f "/sys/bus/pci/devices/$1/iommu_group") && [ -d "$group/devices" ] && is "$(cat "$group/type")" DMA
}

list net "$function"
list rng "$rng_function"
check net-access-platform feature "$device" 33
check rng-access-platform feature "$rng_device" 33
check net-interrupts kind_of_interrupt "$virtio"
check rng-interrupts kind_of_interrupt "$rng_virtio"
if [ "$IOMMU" = yes ]; then
    check net-translated translated "$function"
    check rng-translated translated "$rng_function"
fi
mark requests
check requests many_requests
mark requested
check rebinds rebinds
mark rebound
check lease-after-rebinds lease eth1
check http-after-rebinds fetch /tmp/file
check kernel-log-after-rebinds clean_log
