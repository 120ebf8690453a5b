// consumer.go - keeps a copy of an entity's rows, with amqp091-go
//
//	go run consumer.go [-idle SECONDS] [-fail-once] URI QUEUE
//
// An example to start from: manual acks, nack when processing failed, repeats
// recognised by their message id, nothing older written over something newer, keys
// that change, TRUNCATE, messages that can never be processed, and a connection that
// is lost.  The copy is in memory here.  A service has it in its database, and writes
// what it has seen and what came of it in one transaction, before the ack.  SIGTERM
// ends it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const prefetch = 100
const reconnect = time.Second

// A row of the copy.  Of a deleted one the sequence stays, so that no late message
// revives it.
type entry struct {
	sequence int64
	row      json.RawMessage // as it stands in the body: no number is rounded
}

type consumer struct {
	inbox     map[string]bool // message ids
	entity    map[string]entry
	truncated int64 // sequence of the newest TRUNCATE
	bad       []amqp.Delivery
	failed    map[string]bool
	counts    map[string]int
}

// A message that fails in the same way whenever it comes.
var errBad = errors.New("bad message")

func (c *consumer) write(key string, sequence int64, row json.RawMessage) {
	known, found := c.entity[key]
	if (found && known.sequence >= sequence) || (!found && c.truncated >= sequence) {
		return
	}
	c.entity[key] = entry{sequence, row}
}

func (c *consumer) truncate(sequence int64) {
	if sequence > c.truncated {
		c.truncated = sequence
	}
	for key, known := range c.entity {
		if known.sequence < sequence {
			delete(c.entity, key)
		}
	}
}

// What has no op is no change of a row, but somebody's publish().
func (c *consumer) apply(headers amqp.Table, body []byte) error {
	op, isChange := headers["op"].(string)
	if !isChange {
		return nil
	}
	key, hasKey := headers["key"].(string)
	sequence, hasSequence := headers["sequence"].(int64)
	if op == "t" && hasSequence {
		c.truncate(sequence)
		return nil
	}
	var change struct{ After json.RawMessage }
	if !hasKey || !hasSequence || json.Unmarshal(body, &change) != nil {
		return errBad
	}
	if oldKey, changed := headers["old_key"].(string); changed {
		c.write(oldKey, sequence, nil) // the row has left that key
	}
	c.write(key, sequence, change.After)
	return nil
}

// Returns what it was.
func (c *consumer) process(d amqp.Delivery) (string, error) {
	if c.inbox[d.MessageId] {
		return "repeats", nil
	}
	if err := c.apply(d.Headers, d.Body); err != nil {
		return "", err
	}
	c.inbox[d.MessageId] = true
	return "processed", nil
}

func (c *consumer) handle(d amqp.Delivery, failOnce bool) error {
	if failOnce && !c.failed[d.MessageId] {
		c.failed[d.MessageId] = true
		c.counts["failed"]++
		// a real service waits before it gives a message back
		return d.Nack(false, true)
	}
	result, err := c.process(d)
	if errors.Is(err, errBad) {
		c.bad = append(c.bad, d) // somebody has to look at it
		result = "bad"
	} else if err != nil {
		c.counts["failed"]++
		return d.Nack(false, true)
	}
	c.counts[result]++
	return d.Ack(false)
}

// Until it is to end, with nil.
func (c *consumer) consume(ctx context.Context, deliveries <-chan amqp.Delivery, idle time.Duration, failOnce bool) error {
	for {
		select {
		case d, open := <-deliveries:
			if !open {
				return errors.New("the connection was closed, or the queue deleted")
			}
			if err := c.handle(d, failOnce); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		case <-time.After(idle):
			return nil
		}
	}
}

func (c *consumer) report() error {
	rows := map[string]json.RawMessage{}
	for key, known := range c.entity {
		rows[key] = known.row
	}
	result := map[string]any{"rows": rows}
	for name, count := range c.counts {
		result[name] = count
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func (c *consumer) connect(ctx context.Context, uri, queue string, idle time.Duration, failOnce bool) error {
	connection, err := amqp.Dial(uri)
	if err != nil {
		return err
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	if err := channel.Qos(prefetch, 0, false); err != nil {
		return err
	}
	deliveries, err := channel.Consume(queue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	return c.consume(ctx, deliveries, idle, failOnce)
}

func main() {
	idle := flag.Float64("idle", 1e9, "end when nothing came for so many `seconds`")
	failOnce := flag.Bool("fail-once", false, "each message at its first delivery")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c := consumer{
		inbox:  map[string]bool{},
		entity: map[string]entry{},
		failed: map[string]bool{},
		counts: map[string]int{"processed": 0, "repeats": 0, "failed": 0, "bad": 0},
	}
	// what was not acked when a connection was lost comes again
	for ctx.Err() == nil {
		err := c.connect(ctx, flag.Arg(0), flag.Arg(1), time.Duration(*idle*float64(time.Second)), *failOnce)
		if err == nil {
			break
		}
		log.Print(err)
		time.Sleep(reconnect)
	}
	if err := c.report(); err != nil {
		log.Fatal(err)
	}
}
