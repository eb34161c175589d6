# SPDX-License-Identifier: Apache-2.0 OR MIT
# A guest of a description (demos/). Words of its kernel's command line say what it is: NAME, and ADDRESS, that of its
# first network card with the length of the prefix, or `dhcp`. The kernel hands them to us as variables.
hostname "${NAME:-guest}"
ip link set lo up
# What ADDRESS says, for the card $1.
addressed() {
    await 10 test -e "/sys/class/net/$1" || return 1
    case $ADDRESS in
    dhcp) lease "$1" > /dev/null 2>&1 ;;
    *) ip link set "$1" up && ip addr add "$ADDRESS" dev "$1" ;;
    esac
}
[ -z "$ADDRESS" ] || addressed eth0 || echo "eth0 has no address"
if [ -n "$OBEYS" ]; then
    . /obey
else
    # For somebody who looks at it.
    stty sane
    echo "$(hostname): $(address_of eth0) on eth0. The end of this shell switches the machine off."
    PS1='$(hostname):$PWD# ' setsid cttyhack sh
fi
