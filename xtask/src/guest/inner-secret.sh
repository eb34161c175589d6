# SPDX-License-Identifier: Apache-2.0 OR MIT
# All memory there is, but for what is needed to go on, full of a secret that is never sent (SECRET, in hex); and a token that is sent
# (TOKEN, text). After demo.sh.
host="http://10.0.2.2:$PORT"
kept=/tmp/full
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
# Sets `available`, in MiB. Few processes are started here: all of this is emulated, and then virtual.
look() {
    while read -r key value unit; do
        [ "$key" != MemAvailable: ] || available=$((value / 1024))
    done < /proc/meminfo
}
unharmed() {
    for piece in $kept/*; do
        cmp /tmp/secret "$piece" || return 1
    done
}
printf "$(echo "$SECRET" | sed 's/../\\x&/g')" > /tmp/secret
for n in 1 2 3 4 5 6; do
    s=/tmp/secret
    cat $s $s $s $s $s $s $s $s > /tmp/more && mv /tmp/more $s
done
check secret-made is "$(wc -c < /tmp/secret)" 4194304
# A file system in memory takes half of it only, unless it is told.
mkdir $kept && mount -t tmpfs -o size=100% tmpfs $kept || fail "no room for the secret"
pieces=0
while look && [ "$available" -gt 28 ]; do
    cp /tmp/secret $kept/$pieces || fail "no room for the secret"
    pieces=$((pieces + 1))
done
mark planted "$((4 * pieces)) MiB"
read -r answer
# What is freed is what the kernel takes next, for buffers too.
n=0
while [ $n -lt $((pieces / 2)) ]; do
    rm $kept/$n
    n=$((n + 1))
done
wget -q -O - "$host/file" | sha256sum > /tmp/sum &
mark fetching
read -r answer
wait
check secret-fetch is "$(cat /tmp/sum)" "$SUM  -"
yes "$TOKEN" | head -c 1048576 > /tmp/up
check token-sent is "$(wget -q -O - --post-file=/tmp/up "$host/sum")" "$(sha256sum < /tmp/up | cut -c 1-64)"
# Its requests are done with, and there are others after them.
check secret-rng is "$(dd if=/dev/hwrng bs=64 count=64 2> /dev/null | wc -c)" 4096
check secret-ping ping -q -c 3 -i 0.1 "$GATEWAY"
mark sent
read -r answer
check secret-kept unharmed
