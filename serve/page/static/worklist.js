// The worklist keeps itself up to date: new studies come in on top, and nothing moves that somebody is about to use.
//
// A patient's identifier is sent as a header and kept for this tab alone, so that no address, and with it no history and no
// log of addresses, ever holds it.

import { SessionEnded, announce, ask, clock, localiseTimes, repeat } from "./session.js";

const SECONDS = 4;
const PATIENT = "cxr-ray patient";

const list = document.getElementById("list");
const freshness = document.getElementById("freshness");
const field = document.getElementById("patient");
const filters = document.getElementById("filters");
const asGiven = new WeakMap();
let tag = list.dataset.tag;
let lostSince = null;

function remember(root) {
  for (const row of root.querySelectorAll("tbody tr")) asGiven.set(row, row.innerHTML);
}

async function refresh() {
  try {
    const headers = { "If-None-Match": tag };
    if (field?.dataset.wanted) headers["X-Patient-ID"] = encodeURIComponent(field.dataset.wanted);
    const answer = await ask(list.dataset.rows, { headers });
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      show(await answer.text());
    } else if (answer.status !== 304) {
      throw new Error(`status ${answer.status}`);
    }
    freshness.textContent = `Up to date at ${clock()}`;
    freshness.classList.remove("lost");
    if (lostSince) announce("The service answers again.");
    lostSince = null;
    list.removeAttribute("aria-busy");
  } catch (error) {
    if (error instanceof SessionEnded) return;
    if (!lostSince) announce("The service does not answer; the list is not up to date.");
    lostSince ??= clock();
    freshness.textContent = `No answer from the service since ${lostSince}; trying again`;
    freshness.classList.add("lost");
  }
}

function show(html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  remember(fresh.content);
  localiseTimes(fresh.content);
  const added = merge(list.querySelector("tbody"), fresh.content.querySelector("tbody"));
  const [pages, wanted] = [list.querySelector(".pages"), fresh.content.querySelector(".pages")];
  if (!pages && wanted) list.append(wanted);
  else if (pages && !pages.contains(document.activeElement)) wanted ? pages.replaceWith(wanted) : pages.remove();
  if (added) announce(added === 1 ? "1 new study" : `${added} new studies`);
}

// Rows stay the elements that they were, in place: a moved element loses focus, and what is read aloud.
function merge(body, fresh) {
  const known = new Map([...body.rows].map((row) => [row.dataset.study, row]));
  const wanted = new Set([...fresh.rows].map((row) => row.dataset.study));
  for (const [study, row] of known) {
    if (!wanted.has(study) && !row.contains(document.activeElement)) row.remove();
  }
  let added = 0;
  let place = body.firstElementChild;
  for (const row of [...fresh.rows]) {
    const old = known.get(row.dataset.study);
    if (!old) {
      body.insertBefore(row, place);
      if (row.dataset.study) {
        added += 1;
        row.classList.add("new");
      }
      continue;
    }
    if (asGiven.get(old) !== asGiven.get(row)) update(old, row);
    place = old.nextElementSibling;
  }
  return added;
}

function update(old, row) {
  asGiven.set(old, asGiven.get(row));
  [...row.cells].forEach((cell, index) => {
    if (!old.cells[index].contains(document.activeElement)) old.cells[index].replaceWith(cell);
  });
}

remember(list);
localiseTimes(list);
const now = repeat(refresh, SECONDS);
freshness.textContent = `Up to date at ${clock()}`;

if (field) {
  field.value = field.dataset.wanted = sessionStorage.getItem(PATIENT) ?? "";
  filters.addEventListener("submit", () => sessionStorage.setItem(PATIENT, field.value.trim()));
  document.getElementById("clear").addEventListener("click", () => sessionStorage.removeItem(PATIENT));
  if (field.dataset.wanted) {
    list.setAttribute("aria-busy", "true");
    now();
  }
}

// A phone's screen is for studies.
if (matchMedia("(max-width: 720px)").matches && !("given" in filters.dataset) && !field?.value) filters.parentElement.open = false;
