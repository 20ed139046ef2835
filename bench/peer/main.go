// SPDX-License-Identifier: Apache-2.0

// The peer is what lazymesh's agent is measured against: a plain agent in Go that answers the same signals of the same
// kernel program by the same reads of the same etcd. It decides nothing and keeps nothing true: no judgement of a
// record, no watch, no books. So it does less than the agent, and what the agent adds is on the agent's bill.
//
// It prints "ready", then answers signals until its standard input ends. A line of input names keys, to be read one after
// the other, and a pause in between; the answer is a JSON array of nanoseconds. An empty line asks for the counts.
// Resolving one by one it prints a line for each entry: the address, and nanoseconds from the signal to the update's return.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/perf"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	pushed       = "cilium/state/ip/v1/default/"
	pullOnly     = "cilium/state/ip/v1/ondemand/"
	atOnce       = 64 // addresses in a transaction, whose 128 reads are etcd's limit
	transactions = 8
	waiting      = 1 << 20
	timeout      = 5 * time.Second
	signalMiss   = 3
)

// record has the fields of a pair that an entry is made of.
type record struct {
	IP     string
	ID     uint32
	HostIP string
	Key    uint8
}

type ipcacheKey [24]byte

type ipcacheEntry [24]byte

type peer struct {
	etcd    *clientv3.Client
	ipcache *ebpf.Map
	pending sync.Map
	queue   chan netip.Addr
	lost    atomic.Uint64
	failed  atomic.Uint64
	updated atomic.Uint64
}

func main() {
	pins := flag.String("pins", "", "directory of the pinned maps")
	endpoint := flag.String("endpoint", "", "URL of etcd")
	ca := flag.String("ca", "", "file of the authority, for TLS")
	cert := flag.String("cert", "", "file of our certificate")
	key := flag.String("key", "", "file of its key")
	ring := flag.Int("ring", 0, "bytes of each CPU's ring of signals")
	batch := flag.Bool("batch", false, "read many addresses in a transaction, instead of a goroutine for each")
	flag.Parse()

	etcd, err := connect(*endpoint, *ca, *cert, *key)
	if err != nil {
		log.Fatal(err)
	}
	defer etcd.Close()
	signals, err := ebpf.LoadPinnedMap(filepath.Join(*pins, "lm_signals"), nil)
	if err != nil {
		log.Fatal(err)
	}
	ipcache, err := ebpf.LoadPinnedMap(filepath.Join(*pins, "lm_ipcache"), nil)
	if err != nil {
		log.Fatal(err)
	}
	reader, err := perf.NewReader(signals, *ring)
	if err != nil {
		log.Fatal(err)
	}
	p := &peer{etcd: etcd, ipcache: ipcache, queue: make(chan netip.Addr, waiting)}
	take := p.resolveApart
	if *batch {
		take = func(address netip.Addr, _ int64) { p.queue <- address }
		for range transactions {
			go p.work()
		}
	}
	go p.listen(reader, take)
	fmt.Println("ready")
	p.serve()
}

func connect(endpoint, ca, cert, key string) (*clientv3.Client, error) {
	config := clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: timeout, Logger: zap.NewNop()}
	if ca != "" {
		info := transport.TLSInfo{TrustedCAFile: ca, CertFile: cert, KeyFile: key}
		tls, err := info.ClientConfig()
		if err != nil {
			return nil, err
		}
		config.TLS = tls
	}
	client, err := clientv3.New(config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err = client.Get(ctx, "cilium/.heartbeat", clientv3.WithSerializable())
	return client, err
}

// serve reads keys on demand.
func (p *peer) serve() {
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		if len(line) == 1 {
			fmt.Printf("{\"lost\":%d,\"failed\":%d,\"updated\":%d}\n", p.lost.Load(), p.failed.Load(), p.updated.Load())
			continue
		}
		var asked struct {
			Keys  []string
			Pause time.Duration
		}
		if err := json.Unmarshal(line, &asked); err != nil {
			log.Fatal(err)
		}
		took := make([]int64, 0, len(asked.Keys))
		for _, key := range asked.Keys {
			began := time.Now()
			response, err := p.etcd.Get(context.Background(), key, clientv3.WithSerializable())
			took = append(took, time.Since(began).Nanoseconds())
			if err != nil || len(response.Kvs) != 1 {
				log.Fatalf("read %s: %v", key, err)
			}
			time.Sleep(asked.Pause)
		}
		answer, _ := json.Marshal(took)
		fmt.Println(string(answer))
	}
}

// listen takes signals.
func (p *peer) listen(reader *perf.Reader, take func(netip.Addr, int64)) {
	var sample perf.Record
	for {
		if err := reader.ReadInto(&sample); err != nil {
			if errors.Is(err, perf.ErrClosed) {
				return
			}
			log.Fatal(err)
		}
		p.lost.Add(sample.LostSamples)
		raw := sample.RawSample
		if len(raw) < 40 || binary.NativeEndian.Uint32(raw) != signalMiss {
			continue
		}
		at := int64(binary.NativeEndian.Uint64(raw[32:40]))
		if raw[4] == 1 {
			take(netip.AddrFrom4([4]byte(raw[12:16])), at)
		} else {
			take(netip.AddrFrom16([16]byte(raw[12:28])), at)
		}
	}
}

// resolveApart resolves an address in a goroutine of its own, once at a time.
func (p *peer) resolveApart(address netip.Addr, at int64) {
	if _, busy := p.pending.LoadOrStore(address, struct{}{}); busy {
		return
	}
	go func() {
		defer p.pending.Delete(address)
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		answer, err := p.etcd.Txn(ctx).Then(reads(address)...).Commit()
		if err != nil {
			p.failed.Add(1)
			return
		}
		entry, err := decode(answer.Responses)
		if err == nil {
			err = p.ipcache.Update(keyOf(address), entry, ebpf.UpdateAny)
		}
		if err != nil {
			p.failed.Add(1)
			return
		}
		var now unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
		p.updated.Add(1)
		fmt.Printf("[%q, %d]\n", address, now.Nano()-at)
	}()
}

// work resolves whatever waits, up to a transaction's worth at once.
func (p *peer) work() {
	addresses := make([]netip.Addr, 0, atOnce)
	for address := range p.queue {
		addresses = append(addresses[:0], address)
		for more := true; more && len(addresses) < atOnce; {
			select {
			case next := <-p.queue:
				addresses = append(addresses, next)
			default:
				more = false
			}
		}
		p.resolveTogether(addresses)
	}
}

func (p *peer) resolveTogether(addresses []netip.Addr) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	ops := make([]clientv3.Op, 0, 2*len(addresses))
	for _, one := range addresses {
		ops = append(ops, reads(one)...)
	}
	answer, err := p.etcd.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		p.failed.Add(uint64(len(addresses)))
		return
	}
	keys := make([]ipcacheKey, 0, len(addresses))
	entries := make([]ipcacheEntry, 0, len(addresses))
	for i, address := range addresses {
		entry, err := decode(answer.Responses[2*i : 2*i+2])
		if err != nil {
			p.failed.Add(1)
			continue
		}
		keys, entries = append(keys, keyOf(address)), append(entries, entry)
	}
	written, err := p.ipcache.BatchUpdate(keys, entries, nil)
	p.updated.Add(uint64(written))
	if err != nil {
		p.failed.Add(uint64(len(keys) - written))
	}
}

// reads returns what has to be read for an address: a pod's record is under one of two keys.
func reads(address netip.Addr) []clientv3.Op {
	ip := address.String()
	return []clientv3.Op{
		clientv3.OpGet(pushed+ip, clientv3.WithSerializable()),
		clientv3.OpGet(pullOnly+ip, clientv3.WithSerializable()),
	}
}

// keyOf returns the key of a single address: prefix length, cluster id, pad, family, address.
func keyOf(address netip.Addr) (key ipcacheKey) {
	raw, family := address.AsSlice(), byte(2)
	if address.Is4() {
		family = 1
	}
	binary.NativeEndian.PutUint32(key[:], uint32(32+8*len(raw)))
	key[7] = family
	copy(key[8:], raw)
	return key
}

// decode returns the entry that the record found stands for: identity, tunnel endpoint, pad, key, flags.
func decode(answers []*pb.ResponseOp) (entry ipcacheEntry, err error) {
	kvs := answers[0].GetResponseRange().Kvs
	if len(kvs) == 0 {
		kvs = answers[1].GetResponseRange().Kvs
	}
	if len(kvs) == 0 {
		return entry, errors.New("no record")
	}
	var found record
	if err = json.Unmarshal(kvs[0].Value, &found); err != nil {
		return entry, err
	}
	host, err := netip.ParseAddr(found.HostIP)
	if err != nil {
		return entry, err
	}
	binary.NativeEndian.PutUint32(entry[:], found.ID)
	copy(entry[4:20], host.AsSlice())
	entry[22], entry[23] = found.Key, 2
	return entry, nil
}
