/*-------------------------------------------------------------------------
 *
 * calls.c
 *		Requests to the broker that are waited for, by name.
 *
 * For callers that have nothing else to do meanwhile, as a consumer, or that may let
 * it wait, as the publisher does when it declares topology.  The contracts are in
 * broker.h.
 *
 * Must never: wait longer than rpc_timeout_ms, or name what rabbitmq-c declares.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/broker.h"

BrokerResult
broker_declare_exchange(Broker *broker, const char *exchange, BrokerError *error)
{
	BrokerRequest request = {.kind = BROKER_DECLARE_EXCHANGE,.exchange = exchange};

	return broker_call(broker, &request, NULL, NULL, error);
}

BrokerResult
broker_declare_queue(Broker *broker, const char *queue, const BrokerField *arguments,
					 int narguments, BrokerError *error)
{
	BrokerRequest request = {
		.kind = BROKER_DECLARE_QUEUE,.queue = queue,
		.arguments = arguments,.narguments = narguments,
	};

	return broker_call(broker, &request, NULL, NULL, error);
}

BrokerResult
broker_bind_queue(Broker *broker, const char *queue, const char *exchange,
				  BrokerError *error)
{
	BrokerRequest request = {.kind = BROKER_BIND_QUEUE,.queue = queue,.exchange = exchange};

	return broker_call(broker, &request, NULL, NULL, error);
}

BrokerResult
broker_inspect_queue(Broker *broker, const char *queue, uint32_t *messages,
					 uint32_t *consumers, BrokerError *error)
{
	BrokerRequest request = {.kind = BROKER_INSPECT_QUEUE,.queue = queue};

	return broker_call(broker, &request, messages, consumers, error);
}

bool
broker_counts_doubtful(uint32_t messages, uint32_t consumers, int64_t took_us)
{
	return messages == 0 && consumers == 0 && took_us >= 250000;
}

BrokerResult
broker_delete_queue(Broker *broker, const char *queue, bool if_unused, bool if_empty,
					BrokerError *error)
{
	BrokerRequest request = {
		.kind = BROKER_DELETE_QUEUE,.queue = queue,
		.if_unused = if_unused,.if_empty = if_empty,
	};

	return broker_call(broker, &request, NULL, NULL, error);
}

BrokerResult
broker_unbind_queue(Broker *broker, const char *queue, const char *exchange,
					BrokerError *error)
{
	BrokerRequest request = {.kind = BROKER_UNBIND_QUEUE,.queue = queue,.exchange = exchange};

	return broker_call(broker, &request, NULL, NULL, error);
}

BrokerResult
broker_delete_exchange(Broker *broker, const char *exchange, bool if_unused,
					   BrokerError *error)
{
	BrokerRequest request = {
		.kind = BROKER_DELETE_EXCHANGE,.exchange = exchange,.if_unused = if_unused,
	};

	return broker_call(broker, &request, NULL, NULL, error);
}
