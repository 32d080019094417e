# What the jobs in the guest share. To be sourced there: makes a wire with the kernel's rxe (device
# rxa on va, in the first network namespace) at one end, and namespace "ours" (vb) for Lowtide at
# the other.
#
#   KERNEL4 KERNEL6 OURS4 OURS6   the addresses
#   PROGRAMS                      where our programs are
#   SCALE                         "some" or "all": how much to try
#   ours COMMAND…                 in our namespace
#   link_mtu BYTES                of both ends
#   impair NETEM…                 both directions; nothing for a clean wire
#   wait_for, listens             of ci/lib/wait.sh
#   tried N                       the job has gone through all its cells: to be said at the end
#
# Jobs print a line that begins with "ok" or "FAIL" for each cell.
set -u
. /run/out/wait.sh
KERNEL4=10.9.0.1 KERNEL6=fd00:9::1 OURS4=10.9.0.2 OURS6=fd00:9::2
PROGRAMS=/tmp/programs
SCALE=$(cat /run/out/scale)
# A file of the other machine cannot be mapped while it changes.
cp -r /run/out/programs /tmp

ours() { ip netns exec ours "$@"; }

link_mtu() {
    ip link set va mtu "$1"
    ip -n ours link set vb mtu "$1"
}

impair() {
    tc qdisc del dev va root 2>/dev/null
    ours tc qdisc del dev vb root 2>/dev/null
    [ $# = 0 ] && return
    tc qdisc add dev va root netem "$@" && ours tc qdisc add dev vb root netem "$@"
}

tried() { echo "tried $1"; }

# Index 1 of the table of GIDs is the IPv4 address, 2 the IPv6 one.
has_gids() {
    grep -q 0a09:0001 /sys/class/infiniband/rxa/ports/1/gids/1 2>/dev/null &&
        grep -q fd00:0009 /sys/class/infiniband/rxa/ports/1/gids/2 2>/dev/null
}

ip netns add ours
ip link add va type veth peer name vb netns ours
link_mtu "${LINK_MTU:-1500}"
ip addr add $KERNEL4/24 dev va
ip addr add $KERNEL6/64 dev va nodad
ip link set va up
ip -n ours link set lo up
ip -n ours addr add $OURS4/24 dev vb
ip -n ours addr add $OURS6/64 dev vb nodad
ip -n ours link set vb up
rdma link add rxa type rxe netdev va || exit
wait_for has_gids || exit
