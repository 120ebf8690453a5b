// relay_amqplib - the common relay that polls an outbox table, in Node
//
//     relay_amqplib.mjs DSN PORT EXCHANGE SECONDS
//
// As relay_pika.py does: a thousand rows at a time with FOR UPDATE SKIP LOCKED,
// all in flight at once, confirms, sent_at, commit.

import amqp from 'amqplib'
import pg from 'pg'
import { createInterface } from 'node:readline/promises'
import { setTimeout as sleep } from 'node:timers/promises'

const BATCH = 1000
const POLL = 100

const NEXT = `
select id, message_id::text, key, type, payload::text, extract(epoch from created_at)::integer as created_at
from outbox where sent_at is null order by id limit ${BATCH} for update skip locked`
const SENT = 'update outbox set sent_at = now() where id = any($1)'

const [dsn, port, exchange, seconds] = process.argv.slice(2)

const db = new pg.Client(dsn)
await db.connect()
const connection = await amqp.connect(`amqp://guest:guest@127.0.0.1:${port}/%2F`)
const channel = await connection.createConfirmChannel()

function publish(row) {
  channel.publish(exchange, '', Buffer.from(row.payload), {
    contentType: 'application/json',
    persistent: true,
    mandatory: true,
    messageId: row.message_id,
    type: row.type,
    timestamp: row.created_at,
    appId: 'relay',
    headers: { sequence: Number(row.id), key: row.key },
  })
}

// One batch; how many it had.
async function relay() {
  await db.query('begin')
  const { rows } = await db.query(NEXT)
  rows.forEach(publish)
  await channel.waitForConfirms()
  if (rows.length > 0) await db.query(SENT, [rows.map(row => row.id)])
  await db.query('commit')
  return rows.length
}

const input = createInterface({ input: process.stdin })
console.log('ready')
await new Promise(resolve => input.once('line', resolve))

const end = Number(seconds) > 0 ? Date.now() + seconds * 1000 : Infinity
let count = 0
while (Date.now() < end) {
  const sent = await relay()
  count += sent
  if (sent === 0 && end < Infinity) break
  if (sent === 0) await sleep(POLL)
}
console.log('done')
console.log(count)
process.exit()
