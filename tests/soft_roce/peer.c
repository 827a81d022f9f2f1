// The guest's end of the soft-RoCE test: does with Linux' verbs what one line at a time on stdin asks for.
//
// Every command is answered by exactly one line: "ok ..." or "err WHAT ERRNO". Numbers are decimal or 0x...; what
// was created is named by small numbers, in order of creation. Queue pairs are RC; each has a CQ of its own.
//
//   mr LEN ACCESS                                       ok MR ADDRESS LKEY RKEY      memory is zeroed
//   poke MR OFFSET HEX | peek MR OFFSET LEN             ok | ok HEX
//   fill MR OFFSET LEN SEED                             ok          byte i = (i * 7 + SEED) mod 251
//   differs MR OFFSET LEN SEED                          ok COUNT    bytes that are not what fill would write
//   qp ACCESS                                           ok QP QPN              in INIT
//   rtr QP QPN GID MTU PSN READS MIN_RNR_TIMER          ok          PSN: the first one expected
//   rts QP PSN TIMEOUT RETRY RNR_RETRY READS            ok          PSN: the first one sent
//   write QP MR OFFSET LEN ADDRESS RKEY                 ok          also: read; all requests are signalled
//   write_imm QP MR OFFSET LEN ADDRESS RKEY IMM         ok
//   send QP MR OFFSET LEN | send_imm QP MR OFFSET LEN IMM
//   fetch_add QP MR OFFSET ADDRESS RKEY ADD             ok          old value to OFFSET
//   cmp_swap QP MR OFFSET ADDRESS RKEY COMPARE SWAP
//   recv QP MR OFFSET LEN                               ok
//   poll QP MILLISECONDS                                ok WR_ID STATUS OPCODE LEN IMM, or: ok none
//   state QP                                            ok STATE    as in enum ibv_qp_state
//   counter NAME                                        ok VALUE    of the rxe device, by its name in sysfs
//   drop_qp QP | quit                                   ok
//
// WR_ID counts the requests (or receives) of a queue pair from 0. The program trusts its master: it is a test rig.
#include <endian.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { kMaxQps = 256, kMaxMrs = 256, kMaxWords = 12, kLineMax = 1 << 17, kDepth = 64 };

static struct ibv_context* device;
static struct ibv_pd* pd;

static struct {
  struct ibv_qp* qp;
  struct ibv_cq* cq;
  uint64_t num_requests, num_receives;
} qps[kMaxQps];
static int num_qps;
static struct ibv_mr* mrs[kMaxMrs];
static int num_mrs;

static char* words[kMaxWords];
static int num_words;

static uint64_t number(int word) { return word < num_words ? strtoull(words[word], NULL, 0) : 0; }

static void err(const char* what, int code) { printf("err %s %d\n", what, code); }

static void answer(const char* what, int code) {
  if (code) {
    err(what, code);
  } else {
    printf("ok\n");
  }
}

static struct ibv_qp* qp_at(int word) {
  uint64_t index = number(word);
  return index < (uint64_t)num_qps ? qps[index].qp : NULL;
}

// The range [offset, offset + len) of a region, or NULL where it does not lie inside.
static uint8_t* range(int mr_word, uint64_t offset, uint64_t len) {
  uint64_t index = number(mr_word);
  if (index >= (uint64_t)num_mrs) {
    return NULL;
  }
  uint64_t size = mrs[index]->length;
  return offset <= size && len <= size - offset ? (uint8_t*)mrs[index]->addr + offset : NULL;
}

static uint8_t pattern(uint64_t i, uint64_t seed) { return (uint8_t)((i * 7 + seed) % 251); }

// --- memory ---

static void do_mr(void) {
  uint64_t len = number(1);
  void* memory = NULL;
  if (num_mrs == kMaxMrs || posix_memalign(&memory, 4096, len)) {
    return err("mr", ENOMEM);
  }
  memset(memory, 0, len);
  struct ibv_mr* mr = ibv_reg_mr(pd, memory, len, (int)number(2));
  if (!mr) {
    return err("reg_mr", errno);
  }
  mrs[num_mrs] = mr;
  printf("ok %d %llu %u %u\n", num_mrs++, (unsigned long long)(uintptr_t)memory, mr->lkey, mr->rkey);
}

static void do_poke(void) {
  size_t len = num_words > 3 ? strlen(words[3]) / 2 : 0;
  uint8_t* to = range(1, number(2), len);
  if (!to) {
    return err("poke", ERANGE);
  }
  for (size_t i = 0; i < len; ++i) {
    unsigned byte = 0;
    if (sscanf(words[3] + 2 * i, "%2x", &byte) != 1) {
      return err("poke", EINVAL);
    }
    to[i] = (uint8_t)byte;
  }
  printf("ok\n");
}

static void do_peek(void) {
  uint64_t len = number(3);
  uint8_t* from = range(1, number(2), len);
  if (!from) {
    return err("peek", ERANGE);
  }
  printf("ok ");
  for (uint64_t i = 0; i < len; ++i) {
    printf("%02x", from[i]);
  }
  printf("\n");
}

static void do_fill(void) {
  uint64_t len = number(3);
  uint8_t* to = range(1, number(2), len);
  if (!to) {
    return err("fill", ERANGE);
  }
  for (uint64_t i = 0; i < len; ++i) {
    to[i] = pattern(i, number(4));
  }
  printf("ok\n");
}

static void do_differs(void) {
  uint64_t len = number(3), count = 0;
  uint8_t* from = range(1, number(2), len);
  if (!from) {
    return err("differs", ERANGE);
  }
  for (uint64_t i = 0; i < len; ++i) {
    count += from[i] != pattern(i, number(4));
  }
  printf("ok %llu\n", (unsigned long long)count);
}

// --- queue pairs ---

static void do_qp(void) {
  struct ibv_cq* cq = num_qps < kMaxQps ? ibv_create_cq(device, 2 * kDepth, NULL, NULL, 0) : NULL;
  if (!cq) {
    return err("create_cq", errno);
  }
  struct ibv_qp_init_attr init = {
      .send_cq = cq,
      .recv_cq = cq,
      .qp_type = IBV_QPT_RC,
      .sq_sig_all = 1,
      .cap = {.max_send_wr = kDepth, .max_recv_wr = kDepth, .max_send_sge = 1, .max_recv_sge = 1},
  };
  struct ibv_qp* qp = ibv_create_qp(pd, &init);
  if (!qp) {
    return err("create_qp", errno);
  }
  struct ibv_qp_attr attr = {
      .qp_state = IBV_QPS_INIT, .pkey_index = 0, .port_num = 1, .qp_access_flags = (unsigned)number(1)};
  int code =
      ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (code) {
    return err("init", code);
  }
  qps[num_qps].qp = qp;
  qps[num_qps].cq = cq;
  printf("ok %d %u\n", num_qps++, qp->qp_num);
}

// Our own address of the same family as the peer's: IPv4 shows as ::ffff:a.b.c.d, link-local ones are passed over.
static int own_gid_index(const union ibv_gid* peer) {
  static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
  int want_v4 = !memcmp(peer->raw, mapped, sizeof mapped);
  for (int i = 0; i < 16; ++i) {
    union ibv_gid gid;
    if (ibv_query_gid(device, 1, i, &gid) || !gid.global.interface_id) {
      continue;
    }
    int is_v4 = !memcmp(gid.raw, mapped, sizeof mapped);
    if (is_v4 == want_v4 && gid.raw[0] != 0xfe) {
      return i;
    }
  }
  return -1;
}

static void do_rtr(void) {
  struct ibv_qp* qp = qp_at(1);
  union ibv_gid gid;
  if (!qp || num_words < 8 || strlen(words[3]) != 32) {
    return err("rtr", EINVAL);
  }
  for (int i = 0; i < 16; ++i) {
    unsigned byte = 0;
    sscanf(words[3] + 2 * i, "%2x", &byte);
    gid.raw[i] = (uint8_t)byte;
  }
  int own = own_gid_index(&gid);
  if (own < 0) {
    return err("gid", EADDRNOTAVAIL);
  }
  struct ibv_qp_attr attr = {
      .qp_state = IBV_QPS_RTR,
      .dest_qp_num = (uint32_t)number(2),
      .ah_attr = {.is_global = 1,
                  .port_num = 1,
                  .grh = {.dgid = gid, .sgid_index = (uint8_t)own, .hop_limit = 64}},
      .rq_psn = (uint32_t)number(5),
      .max_dest_rd_atomic = (uint8_t)number(6),
      .min_rnr_timer = (uint8_t)number(7),
  };
  for (int mtu = IBV_MTU_256; mtu <= IBV_MTU_4096; ++mtu) {
    if ((128u << mtu) <= number(4)) {
      attr.path_mtu = (enum ibv_mtu)mtu;
    }
  }
  answer("rtr", ibv_modify_qp(qp, &attr,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
}

static void do_rts(void) {
  struct ibv_qp* qp = qp_at(1);
  if (!qp || num_words < 7) {
    return err("rts", EINVAL);
  }
  struct ibv_qp_attr attr = {
      .qp_state = IBV_QPS_RTS,
      .sq_psn = (uint32_t)number(2),
      .timeout = (uint8_t)number(3),
      .retry_cnt = (uint8_t)number(4),
      .rnr_retry = (uint8_t)number(5),
      .max_rd_atomic = (uint8_t)number(6),
  };
  answer("rts", ibv_modify_qp(qp, &attr,
                              IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                  IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC));
}

static void do_state(void) {
  struct ibv_qp_attr attr;
  struct ibv_qp_init_attr init;
  struct ibv_qp* qp = qp_at(1);
  int code = qp ? ibv_query_qp(qp, &attr, IBV_QP_STATE, &init) : EINVAL;
  if (code) {
    return err("query_qp", code);
  }
  printf("ok %d\n", attr.qp_state);
}

static void do_drop_qp(void) {
  struct ibv_qp* qp = qp_at(1);
  int code = qp ? ibv_destroy_qp(qp) : EINVAL;
  if (!code) {
    code = ibv_destroy_cq(qps[number(1)].cq);
    qps[number(1)].qp = NULL;
  }
  answer("drop_qp", code);
}

// --- work requests ---

static void do_recv(void) {
  struct ibv_qp* qp = qp_at(1);
  uint8_t* memory = range(2, number(3), number(4));
  if (!qp || !memory) {
    return err("recv", EINVAL);
  }
  struct ibv_sge sge = {
      .addr = (uintptr_t)memory, .length = (uint32_t)number(4), .lkey = mrs[number(2)]->lkey};
  struct ibv_recv_wr wr = {.wr_id = qps[number(1)].num_receives++, .sg_list = &sge, .num_sge = 1}, *bad;
  answer("post_recv", ibv_post_recv(qp, &wr, &bad));
}

// VERB QP MR OFFSET, then per verb what the list on top says.
static void do_request(void) {
  static const struct {
    const char* name;
    enum ibv_wr_opcode opcode;
  } verbs[] = {
      {"write", IBV_WR_RDMA_WRITE},    {"write_imm", IBV_WR_RDMA_WRITE_WITH_IMM},
      {"read", IBV_WR_RDMA_READ},      {"send", IBV_WR_SEND},
      {"send_imm", IBV_WR_SEND_WITH_IMM}, {"fetch_add", IBV_WR_ATOMIC_FETCH_AND_ADD},
      {"cmp_swap", IBV_WR_ATOMIC_CMP_AND_SWP},
  };
  const int num_verbs = sizeof verbs / sizeof *verbs;
  int verb = 0;
  while (verb < num_verbs && strcmp(verbs[verb].name, words[0])) {
    ++verb;
  }
  if (verb == num_verbs) {
    return err("unknown", EINVAL);
  }
  enum ibv_wr_opcode opcode = verbs[verb].opcode;
  int is_atomic = opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
  uint64_t len = is_atomic ? 8 : number(4);
  struct ibv_qp* qp = qp_at(1);
  uint8_t* memory = range(2, number(3), len);
  if (!qp || !memory) {
    return err("request", EINVAL);
  }
  struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = (uint32_t)len, .lkey = mrs[number(2)]->lkey};
  struct ibv_send_wr wr = {.wr_id = qps[number(1)].num_requests++,
                           .sg_list = &sge,
                           .num_sge = len != 0,
                           .opcode = opcode,
                           .send_flags = IBV_SEND_SIGNALED},
                     *bad;
  if (is_atomic) {
    wr.wr.atomic.remote_addr = number(4);
    wr.wr.atomic.rkey = (uint32_t)number(5);
    wr.wr.atomic.compare_add = number(6);
    wr.wr.atomic.swap = number(7);
  } else if (opcode == IBV_WR_SEND || opcode == IBV_WR_SEND_WITH_IMM) {
    wr.imm_data = htobe32((uint32_t)number(5));
  } else {
    wr.wr.rdma.remote_addr = number(5);
    wr.wr.rdma.rkey = (uint32_t)number(6);
    wr.imm_data = htobe32((uint32_t)number(7));
  }
  answer("post_send", ibv_post_send(qp, &wr, &bad));
}

static uint64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void do_poll(void) {
  if (!qp_at(1)) {
    return err("poll", EINVAL);
  }
  uint64_t until = now_ms() + number(2);
  struct ibv_wc wc;
  int count;
  while (!(count = ibv_poll_cq(qps[number(1)].cq, 1, &wc)) && now_ms() < until) {
    usleep(200);
  }
  if (count < 0) {
    return err("poll_cq", EIO);
  }
  if (!count) {
    printf("ok none\n");
    return;
  }
  int is_good = wc.status == IBV_WC_SUCCESS;
  uint32_t imm = is_good && wc.wc_flags & IBV_WC_WITH_IMM ? be32toh(wc.imm_data) : 0;
  printf("ok %llu %d %d %u %u\n", (unsigned long long)wc.wr_id, wc.status, is_good ? (int)wc.opcode : -1,
         is_good ? wc.byte_len : 0, imm);
}

static void do_counter(void) {
  char path[160], value[32] = "";
  snprintf(path, sizeof path, "/sys/class/infiniband/%s/ports/1/hw_counters/%.80s",
           ibv_get_device_name(device->device), num_words > 1 ? words[1] : "");
  FILE* file = fopen(path, "r");
  if (!file || !fgets(value, sizeof value, file)) {
    err("counter", ENOENT);
  } else {
    printf("ok %lu\n", strtoul(value, NULL, 10));
  }
  if (file) {
    fclose(file);
  }
}

// --- the loop ---

static void obey(void) {
  static const struct {
    const char* name;
    void (*command)(void);
  } commands[] = {
      {"mr", do_mr},       {"poke", do_poke}, {"peek", do_peek},       {"fill", do_fill},
      {"differs", do_differs}, {"qp", do_qp}, {"rtr", do_rtr},         {"rts", do_rts},
      {"state", do_state}, {"drop_qp", do_drop_qp}, {"recv", do_recv}, {"poll", do_poll},
      {"counter", do_counter},
  };
  for (size_t i = 0; i < sizeof commands / sizeof *commands; ++i) {
    if (!strcmp(commands[i].name, words[0])) {
      return commands[i].command();
    }
  }
  do_request();
}

static int open_device(void) {
  int count = 0;
  struct ibv_device** list = ibv_get_device_list(&count);
  device = count ? ibv_open_device(list[0]) : NULL;
  pd = device ? ibv_alloc_pd(device) : NULL;
  return pd ? 0 : -1;
}

// A terminal would echo commands and translate line ends.
static void make_raw(void) {
  struct termios mode;
  if (!tcgetattr(0, &mode)) {
    cfmakeraw(&mode);
    tcsetattr(0, TCSANOW, &mode);
  }
}

int main(void) {
  static char line[kLineMax];
  make_raw();
  setvbuf(stdout, NULL, _IOFBF, 1 << 16);
  if (open_device()) {
    printf("err no_device %d\n", errno);
    fflush(stdout);
    return 1;
  }
  printf("ok ready %s\n", ibv_get_device_name(device->device));
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    num_words = 0;
    for (char* word = strtok(line, " \r\n"); word && num_words < kMaxWords; word = strtok(NULL, " \r\n")) {
      words[num_words++] = word;
    }
    if (!num_words) {
      continue;
    }
    if (!strcmp(words[0], "quit")) {
      printf("ok\n");
      fflush(stdout);
      return 0;
    }
    obey();
    fflush(stdout);
  }
  return 0;
}
