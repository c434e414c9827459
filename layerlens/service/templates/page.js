"use strict";
// The server's page: jobs with their live stages, a report, two results side by side, and a form for new jobs.
// The token stays in this closure (or, when asked, in the tab's sessionStorage); it is only ever sent as a header.
(() => {
  const $ = (id) => document.getElementById(id);
  const FINAL = ["succeeded", "failed", "cancelled"];
  const KEPT = "layerlens-token";
  const POLL_MS = 2000;
  const RESOURCES = {
    trainable_params: "trainable parameters", flops: "added FLOPs", vram_gb: "training memory, GB",
    latency_ms: "forward latency, ms", step_ms: "training step, ms",
  };
  let token = sessionStorage.getItem(KEPT) ?? "";
  let open = null; // id of the job that is shown
  let following = null; // the AbortController of its stream
  let again = null; // {statistics, config} of a result that is chosen from again
  let key = newKey();
  let before = null; // where older jobs begin
  const seen = new Map(); // id -> every job that was listed
  const chosen = new Set();
  const now = new Map(); // id -> what a job is doing

  function newKey() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }
  const say = (text) => { $("status").textContent = text; };
  const make = (name, text = "", attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    return made;
  };
  const button = (text, label, act) => {
    const made = make("button", text, { type: "button", "aria-label": label });
    made.addEventListener("click", act);
    return made;
  };
  const figure = (value) => (typeof value === "number" ? Number(value.toPrecision(6)).toLocaleString("en") : String(value ?? "–"));

  class Refused extends Error {
    constructor(status, detail) { super(detail); this.status = status; }
  }
  async function ask(path, options = {}) {
    const headers = { ...options.headers };
    if (token) headers.Authorization = `Bearer ${token}`;
    const answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
    if (answer.ok) return answer;
    let detail = answer.statusText;
    try { detail = (await answer.json()).detail ?? detail; } catch { /* not ours: the status has to do */ }
    if (answer.status === 401 && open !== undefined) signedOut();
    throw new Refused(answer.status, detail);
  }
  const json = async (path, options) => (await ask(path, options)).json();

  // ---- signing in
  function signedOut() {
    token = "";
    sessionStorage.removeItem(KEPT);
    following?.abort();
    $("signed-in").hidden = $("sign-out").hidden = true;
    $("sign-in").hidden = false;
  }
  async function signIn() {
    await list();
    $("sign-in").hidden = true;
    $("signed-in").hidden = false;
    $("sign-out").hidden = !token;
  }
  $("sign-in-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const field = $("token");
    token = field.value.trim();
    $("token-error").textContent = "";
    field.removeAttribute("aria-invalid");
    const keep = $("keep").checked;
    const given = token;
    try {
      if (!/^[\x21-\x7e]+$/.test(token)) throw new Refused(401, "");
      await signIn();
      if (keep) sessionStorage.setItem(KEPT, given);
      field.value = "";
      say("Signed in.");
      $("main").focus();
    } catch (error) {
      token = "";
      $("token-error").textContent = error.status === 401 ? "The server does not know this token" : error.message;
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  });
  $("sign-out").addEventListener("click", () => {
    signedOut();
    location.reload(); // nothing of what was shown stays in this page
  });

  // ---- the list
  async function list() {
    const found = await json("v1/jobs?limit=50");
    before ??= found.next_before;
    $("older").hidden = !before;
    const newest = new Set(found.jobs.map((job) => job.id));
    const lowest = found.jobs.at(-1)?.number ?? 0;
    for (const job of [...seen.values()].filter((one) => !newest.has(one.id))) {
      if (job.number > lowest || !found.next_before) seen.delete(job.id); // somebody removed it
      else if (!FINAL.includes(job.state)) await look(job.id);
    }
    for (const job of found.jobs) seen.set(job.id, job);
    draw([...seen.values()].sort((one, other) => other.number - one.number));
  }
  async function look(id) {
    try { seen.set(id, await json(`v1/jobs/${id}`)); } catch (error) {
      if (error.status !== 404) throw error;
      seen.delete(id);
    }
  }
  $("older").addEventListener("click", async () => {
    const found = await json(`v1/jobs?limit=50&before=${before}`);
    for (const job of found.jobs) seen.set(job.id, job);
    before = found.next_before ?? 0;
    await list();
  });
  function draw(jobs) {
    const body = $("jobs").tBodies[0];
    const rows = new Map([...body.rows].map((row) => [row.dataset.id, row]));
    $("no-jobs").hidden = jobs.length > 0;
    jobs.forEach((job, place) => {
      let row = rows.get(job.id);
      const state = `${job.state} ${job.cancel_requested}`;
      if (!row) row = emptyRow(job);
      rows.delete(job.id);
      if (row.dataset.state !== state) fill(row, job, state);
      row.cells[6].textContent = job.state === "running" ? now.get(job.id) ?? "started" : job.error ?? "";
      if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
    });
    rows.forEach((row) => row.remove());
  }
  function emptyRow(job) {
    const row = document.createElement("tr");
    row.dataset.id = job.id;
    for (let cell = 0; cell < 9; cell += 1) row.append(document.createElement(cell === 1 ? "th" : "td"));
    row.cells[1].scope = "row";
    row.cells[1].append(button(`Job ${job.number}`, `Show job ${job.number}`, () => show(job.id)));
    row.cells[2].textContent = job.kind;
    row.cells[3].textContent = job.model ?? "";
    row.cells[4].textContent = job.data ?? "";
    row.cells[7].textContent = job.created_at.slice(0, 19).replace("T", " ");
    return row;
  }
  function fill(row, job, state) {
    const held = row.contains(document.activeElement);
    row.dataset.state = state;
    row.cells[5].textContent = job.cancel_requested && !FINAL.includes(job.state) ? `${job.state}, stopping` : job.state;
    if (job.state === "succeeded" && !row.cells[0].firstChild) {
      const box = make("input", "", { type: "checkbox", "aria-label": `Compare job ${job.number}` });
      box.addEventListener("change", () => {
        if (box.checked) chosen.add(job.id); else chosen.delete(job.id);
        $("compare-button").disabled = chosen.size !== 2;
      });
      row.cells[0].append(box);
    }
    row.cells[8].replaceChildren(...actions(job));
    if (held && !row.contains(document.activeElement)) row.querySelector("button").focus();
  }
  function actions(job) {
    if (!FINAL.includes(job.state)) {
      const stop = button("Cancel", `Cancel job ${job.number}`, () => act(job, `v1/jobs/${job.id}/cancel`, "POST", "asked to stop"));
      stop.disabled = job.cancel_requested;
      return [stop];
    }
    const remove = button("Remove", `Remove job ${job.number}`, () => {
      if (confirm(`Remove job ${job.number} and its results from the server?`)) {
        act(job, `v1/jobs/${job.id}`, "DELETE", "removed");
      }
    });
    if (job.state !== "succeeded") return [remove];
    return [button("Choose again", `Choose again from job ${job.number}`, () => chooseAgain(job)), remove];
  }
  async function act(job, path, method, done) {
    try {
      await ask(path, { method });
      say(`Job ${job.number} was ${done}.`);
      if (method === "DELETE") { chosen.delete(job.id); seen.delete(job.id); }
      if (method === "DELETE" && open === job.id) { $("job").hidden = true; open = null; following?.abort(); }
      await list();
    } catch (error) { say(`Job ${job.number}: ${error.message}`); }
  }

  // ---- one job
  async function show(id) {
    following?.abort();
    following = new AbortController();
    open = id;
    const job = await json(`v1/jobs/${id}`);
    $("job-title").textContent = `Job ${job.number}`;
    for (const part of ["stages", "warnings", "files", "report"]) $(part).replaceChildren();
    $("job-error").textContent = $("progress-text").textContent = "";
    $("files-part").hidden = true;
    $("progress").hidden = $("progress-label").hidden = true;
    $("job").hidden = false;
    state(job);
    $("job-title").focus();
    try { await follow(job, following.signal); } catch (error) { if (error.name !== "AbortError") say(error.message); }
  }
  function state(job) {
    $("job-state").textContent = `${job.kind} of ${job.model ?? "a model"} on ${job.data ?? "its data"}: ${job.state}`;
    $("job-error").textContent = job.error ?? "";
  }
  async function follow(job, signal) {
    const stages = new Map();
    for await (const { kind, data } of events(job.id, signal)) {
      if (kind === "stage") {
        const item = stages.get(data.stage) ?? $("stages").appendChild(make("li"));
        stages.set(data.stage, item);
        item.textContent = data.state === "started" ? `${data.stage}: running` : `${data.stage}: ${data.state}, ${data.seconds} s`;
      } else if (kind === "progress") {
        const bar = $("progress");
        bar.hidden = $("progress-label").hidden = false;
        if (data.total) { bar.max = data.total; bar.value = data.done; } else bar.removeAttribute("value");
        const count = data.total ? `${data.done} of ${data.total}` : "";
        $("progress-text").textContent = [data.step, count, data.note].filter(Boolean).join(", ");
        now.set(job.id, $("progress-text").textContent);
      } else if (kind === "warning") {
        $("warnings").append(make("li", data.message));
      } else if (kind === "state" && FINAL.includes(data.state)) {
        $("progress").hidden = $("progress-label").hidden = true;
        $("progress-text").textContent = "";
        for (const [name, item] of stages) if (item.textContent.endsWith(": running")) item.textContent = `${name}: ended`;
        const ended = await json(`v1/jobs/${job.id}`);
        state(ended);
        say(`Job ${job.number} has ${data.state}.`);
        if (data.state === "succeeded") await results(job);
        await list();
        return;
      }
    }
  }
  async function* events(id, signal) {
    for (let last = "0"; ;) {
      try {
        const answer = await ask(`v1/jobs/${id}/events`, { signal, headers: { "Last-Event-ID": last } });
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = "";
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
          text += part.value;
          const whole = text.split("\n\n");
          text = whole.pop();
          for (const lines of whole) {
            const fields = Object.fromEntries(lines.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
            if (!fields.data) continue;
            last = fields.id;
            const event = { kind: fields.event, data: JSON.parse(fields.data) };
            yield event;
            if (event.kind === "state" && FINAL.includes(event.data.state)) return;
          }
        }
      } catch (error) {
        if (error.name === "AbortError" || (error.status && error.status < 500 && error.status !== 429)) throw error;
      }
      const job = await json(`v1/jobs/${id}`, { signal });
      if (FINAL.includes(job.state) && last !== "0") return; // the stream was cut after its end
      await new Promise((wake) => setTimeout(wake, POLL_MS));
    }
  }
  async function results(job) {
    const result = await json(`v1/jobs/${job.id}/result`);
    const paths = [...new Set(Object.values(result.files))];
    $("files").replaceChildren(...paths.map((path) => {
      const item = make("li");
      item.append(button(path, `Fetch ${path}`, () => fetchFile(job.id, path)));
      return item;
    }));
    $("files-part").hidden = false;
    if (result.files.report) await embed($("report"), job.id, result.files.report, `Report of job ${job.number}`);
  }
  const fileOf = (id, path) => `v1/jobs/${id}/files/${path.split("/").map(encodeURIComponent).join("/")}`;
  async function fetchFile(id, path) {
    const address = URL.createObjectURL(await (await ask(fileOf(id, path))).blob());
    const link = make("a", "", { href: address, download: path.split("/").pop() });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`Fetched ${path}.`);
  }
  async function embed(place, id, path, title) {
    const html = await (await ask(fileOf(id, path))).text();
    // Without allow-same-origin the report has an origin of its own: it reaches neither this page nor its storage.
    const frame = make("iframe", "", { title, sandbox: "allow-scripts", src: "report-frame", referrerpolicy: "no-referrer" });
    frame.addEventListener("load", () => frame.contentWindow.postMessage({ html }, "*"), { once: true });
    place.replaceChildren(frame);
  }

  // ---- two results
  $("compare-button").addEventListener("click", async () => {
    try {
      const jobs = (await Promise.all([...chosen].map((id) => json(`v1/jobs/${id}`)))).sort((a, b) => a.number - b.number);
      const found = await Promise.all(jobs.map(async (job) => {
        const result = await json(`v1/jobs/${job.id}/result`);
        return { job, result, manifest: await json(fileOf(job.id, result.files.manifest_json ?? "manifest.json")) };
      }));
      compare(found);
      $("comparison").hidden = false;
      $("comparison-title").focus();
      $("two-reports").replaceChildren();
      for (const { job, result } of found) {
        if (result.files.report) await embed($("two-reports").appendChild(make("div")), job.id, result.files.report, `Report of job ${job.number}, beside the other`);
      }
    } catch (error) { say(error.message); }
  });
  function table(place, heads, rows) {
    const head = make("thead"), body = make("tbody");
    head.append(make("tr"));
    head.rows[0].append(...heads.map((text) => make("th", text, { scope: "col" })));
    for (const [name, ...values] of rows) {
      const row = make("tr");
      row.append(make("th", name, { scope: "row" }), ...values.map((value) => make("td", value)));
      body.append(row);
    }
    place.replaceChildren(head, body);
  }
  function compare(found) {
    const names = found.map(({ job }) => `Job ${job.number}`);
    const use = (result, name) => {
      const one = result.resources.find((each) => each.resource === name);
      return one ? figure(one.total) + (one.budget === null ? "" : ` of ${figure(one.budget)}`) : "–";
    };
    const resources = [...new Set(found.flatMap(({ result }) => result.resources.map((each) => each.resource)))];
    const methods = [...new Set(found.flatMap(({ result }) => Object.keys(result.methods)))]
      .filter((name) => found.some(({ result }) => result.methods[name]));
    const row = (name, of) => [name, ...found.map(of)];
    table($("figures"), ["Figure", ...names], [
      row("model", ({ job }) => job.model ?? "–"),
      row("data", ({ job }) => job.data ?? "–"),
      row("score", ({ result }) => figure(result.score)),
      row("proved bound", ({ result }) => figure(result.upper_bound)),
      row("gap", ({ result }) => `${figure(100 * result.gap)} %`),
      ...resources.map((name) => row(RESOURCES[name] ?? name.replaceAll("_", " "), ({ result }) => use(result, name))),
      ...methods.map((name) => row(`layers with ${name}`, ({ result }) => figure(result.methods[name] ?? 0))),
    ]);
    const choices = found.map(({ manifest }) => new Map(manifest.allocations.map((each) => [each.layer, each.rank ? `${each.method} ${each.rank}` : "none"])));
    const layers = [...new Set(choices.flatMap((each) => [...each.keys()]))];
    const differ = layers.filter((layer) => choices[0].get(layer) !== choices[1].get(layer));
    const units = new Set(found.map(({ manifest }) => `${manifest.utility_model} ${manifest.utility_unit}`));
    $("differences-note").textContent = `${differ.length} of ${layers.length} layers differ.` +
      (units.size > 1 ? " The scores cannot be compared, because the utility models differ." : "");
    table($("differences"), ["Layer", ...names], differ.map((layer) => [layer, ...choices.map((each) => each.get(layer) ?? "not there")]));
  }

  // ---- submitting
  const fields = () => [...$("submit-form").querySelectorAll("input[name]")];
  const budgets = () => fields().filter((field) => field.name.startsWith("optimization."));
  async function chooseAgain(job) {
    try {
      const manifest = await json(fileOf(job.id, "manifest.json"));
      again = { statistics: `job:${job.id}`, config: manifest.provenance.config };
      $("own-model").disabled = true;
      $("again").replaceChildren(
        `Chooses again from the statistics of job ${job.number}, within the budgets that you enter here. `,
        button("Measure a model instead", "Measure a model instead", () => { forget(); $("model").focus(); }),
      );
      $("again").hidden = false;
      key = newKey();
      budgets()[0].focus();
    } catch (error) { say(error.message); }
  }
  function forget() {
    again = null;
    $("own-model").disabled = false;
    $("again").hidden = true;
    key = newKey();
  }
  function wrongField(field, text) {
    field.setAttribute("aria-invalid", "true");
    $(`${field.id}-error`).textContent = text;
  }
  function problems() {
    const found = [];
    if ($("yaml").value.trim()) return found;
    if (!again) {
      for (const id of ["model", "data"]) if (!$(id).value.trim()) found.push([$(id), `Name the ${id} to use`]);
    }
    const given = budgets().filter((field) => field.value.trim());
    if (!given.length) found.push([budgets()[0], "Give at least one budget"]);
    for (const field of given) {
      if (!/^\s*\d[\d_.]*(e[+-]?\d+)?\s*[a-z]*\s*$/i.test(field.value)) found.push([field, "Write a number such as 300k, 8GB or 20ms"]);
    }
    return found;
  }
  function submission() {
    const yaml = $("yaml").value;
    if (yaml.trim()) return again ? { kind: "optimize", config: yaml, statistics: again.statistics } : { kind: "run", config: yaml };
    const config = again ? structuredClone(again.config) : {};
    if (again) for (const field of budgets()) delete config.optimization?.[field.name.split(".")[1]];
    for (const field of fields()) {
      const value = field.value.trim();
      if (!value || field.matches(":disabled")) continue;
      const [section, name] = field.name.split(".");
      config[section] = { ...config[section], [name]: value };
    }
    return again ? { kind: "optimize", config, statistics: again.statistics } : { kind: "run", config };
  }
  $("submit-form").addEventListener("input", () => { key = newKey(); });
  $("submit-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("submit-errors").replaceChildren();
    for (const field of fields()) {
      field.removeAttribute("aria-invalid");
      $(`${field.id}-error`).textContent = "";
    }
    const wrong = problems();
    wrong.forEach(([field, text]) => wrongField(field, text));
    if (wrong.length) { wrong[0][0].focus(); return; }
    const send = event.target.querySelector("button[type=submit]");
    send.disabled = true;
    try {
      const job = await json("v1/jobs", {
        method: "POST",
        headers: { "Content-Type": "application/json", "Idempotency-Key": key },
        body: JSON.stringify(submission()),
      });
      key = newKey();
      say(`Job ${job.number} was submitted.`);
      await list();
      show(job.id);
    } catch (error) {
      let first = null;
      for (const line of error.message.split("\n")) {
        const field = fields().find((each) => line.replace(/^config[.:]\s*/, "").startsWith(each.name) && !each.matches(":disabled"));
        if (field && !$("yaml").value.trim()) { wrongField(field, line); first ??= field; } else $("submit-errors").append(make("li", line));
      }
      first?.focus();
    } finally { send.disabled = false; }
  });

  // ---- start
  (async () => {
    try {
      await signIn();
    } catch (error) {
      signedOut();
      if (error.status !== 401) say(`Cannot reach the server: ${error.message}`);
    }
    setInterval(async () => {
      if (document.hidden || $("signed-in").hidden) return;
      try { await list(); } catch (error) { if (error.status !== 401) say(`Cannot reach the server: ${error.message}`); }
    }, POLL_MS);
  })();
})();
