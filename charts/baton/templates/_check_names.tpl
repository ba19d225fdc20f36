{{/* What names other objects of the cluster's, and its networks. */}}

{{/* Kubernetes' names: https://kubernetes.io/docs/concepts/overview/working-with-objects/names */}}
{{- define "baton.checkObjectNames" -}}
{{- $values := .Values -}}
{{- $secrets := dict "redis.existingSecret" $values.redis.existingSecret "redis.embedded.password.existingSecret" $values.redis.embedded.password.existingSecret "rayRedis.password.existingSecret" $values.rayRedis.password.existingSecret -}}
{{- range $name := list "cluster" "controllerToken" "apiKey" "rayToken" "huggingFace" -}}
{{- $_ := set $secrets (printf "secrets.%s.existingSecret" $name) (index $values.secrets $name).existingSecret -}}
{{- end -}}
{{- range $index, $name := $values.images.pullSecrets -}}
{{- $_ := set $secrets (printf "images.pullSecrets[%d]" $index) $name -}}
{{- end -}}
{{- $accounts := dict -}}
{{- range $for, $name := (default (dict) $values.serviceAccount.names) -}}
{{- $_ := set $accounts (printf "serviceAccount.names.%s" $for) $name -}}
{{- end -}}
{{- include "baton.checkNamesOf" (dict "kind" "Secret" "names" $secrets) -}}
{{- include "baton.checkNamesOf" (dict "kind" "ServiceAccount" "names" $accounts) -}}
{{- include "baton.checkNamesOf" (dict "kind" "PersistentVolumeClaim" "names" (dict "model.pvc.claimName" (default (dict) $values.model.pvc).claimName)) -}}
{{- end -}}

{{/* Each empty or a DNS-1123 subdomain. (dict "kind" Secret "names" {<values' path>: name}) */}}
{{- define "baton.checkNamesOf" -}}
{{- $part := "[a-z0-9]([a-z0-9-]*[a-z0-9])?" -}}
{{- range $what, $name := .names -}}
{{- if and $name (or (gt (len $name) 253) (not (regexMatch (printf "^%s([.]%s)*$" $part $part) $name))) -}}
{{- fail (printf "%s is %q, which can name no %s: lower-case letters, digits, hyphens and dots, beginning and ending with a letter or a digit" $what $name $.kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (the values' networkPolicy) */}}
{{- define "baton.checkAllPeers" -}}
{{- range $what, $peers := dict "clients" .clients "controllerClients" .controllerClients "monitoring" .monitoring "redis.to" .redis.to "rayRedis.to" .rayRedis.to -}}
{{- range $peer := $peers -}}
{{- with $peer.ipBlock -}}
{{- if or $peer.podSelector $peer.namespaceSelector -}}
{{- fail (printf "networkPolicy.%s has a peer with an ipBlock and a selector: Kubernetes takes one or the other; make two peers of it" $what) -}}
{{- end -}}
{{- range $network := prepend (default (list) .except) .cidr -}}
{{- include "baton.checkNetwork" (dict "what" $what "network" $network) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (dict "what" clients "network" 10.0.0.0/8) */}}
{{- define "baton.checkNetwork" -}}
{{- $byte := "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])" -}}
{{- $v4 := printf "^(%s[.]){3}%s/(3[0-2]|[12]?[0-9])$" $byte $byte -}}
{{- $v6 := "^[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$" -}}
{{- if not (or (regexMatch $v4 .network) (regexMatch $v6 .network)) -}}
{{- fail (printf "networkPolicy.%s has an ipBlock of %q, which is no network: an address and the length of its prefix, as in 10.0.0.0/8; 10.1.2.3/32 is one address" .what .network) -}}
{{- end -}}
{{- end -}}
